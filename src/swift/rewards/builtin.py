"""Shipped rewards that look at the form of an answer. Formulas and examples: docs/rewards.md.

Not here: rewards that compare with a solution (accuracy.py).
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from swift.plugins.hooks import ORM

_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_REACT = re.compile(r"<think>.*?</think>\s*Action:.*?Action Input:", re.DOTALL)


class Format(ORM):
    """1 for exactly `<think>...</think>`, blanks, `<answer>...</answer>`, else 0."""

    def __call__(self, completions: list[str], **_columns: Any) -> list[float | None]:
        return [float(_FORMAT.fullmatch(text) is not None) for text in completions]


class ReActFormat(ORM):
    """1 for an answer that begins `<think>...</think>`, blanks, `Action: ... Action Input:`, else 0."""

    def __call__(self, completions: list[str], **_columns: Any) -> list[float | None]:
        return [float(_REACT.match(text) is not None) for text in completions]


class ToolCall(ORM):
    """1 where an answer's last `Action: ... Action Input: ...` is that of the column `solution`, else 0.

    Inputs are compared as JSON where the solution's is JSON, else as text. What an answer says behind
    `Observation:` is not its own.
    """

    def __call__(self, completions: list[str], solution: list[str], **_columns: Any) -> list[float | None]:
        return [
            None if right is None else float(_read_call(text) == _read_call(right))
            for text, right in zip(completions, solution, strict=True)
        ]


def _read_call(text: str) -> tuple[str, Any]:
    """The last tool that a text calls, and with what; no input is an empty object."""
    _, found, call = text.partition("Observation:")[0].rpartition("Action:")
    name, _, given = call.partition("Action Input:")
    try:
        given = json.loads(given or "{}")
    except ValueError:
        given = given.strip()
    return name.strip() if found else "", given


class RepetitionPenalty(ORM):
    """(1 - different n-grams / n-grams) * the greatest penalty, over lower-cased words. arXiv:2502.03373."""

    def __init__(self, repetition_n_grams: int = 3, repetition_max_penalty: float = -1.0) -> None:
        self.size, self.penalty = repetition_n_grams, repetition_max_penalty

    def __call__(self, completions: list[str], **_columns: Any) -> list[float | None]:
        return [self._judge(text.lower().split()) for text in completions]

    def _judge(self, words: list[str]) -> float:
        grams = [tuple(words[i : i + self.size]) for i in range(len(words) - self.size + 1)]
        return (1 - len(set(grams)) / len(grams)) * self.penalty if grams else 0.0


class SoftOverlong(ORM):
    """0 up to `soft_max_length - soft_cache_length` tokens, from there falling to -1 and staying there.

    Source: DAPO, arXiv:2503.14476 eq. 13.
    """

    def __init__(self, soft_max_length: int, soft_cache_length: int) -> None:
        self.cache, self.start = soft_cache_length, soft_max_length - soft_cache_length

    def __call__(
        self, _completions: list[str], response_token_ids: Sequence[Sequence[int]], **_columns: Any
    ) -> list[float | None]:
        excess = [(len(ids) - self.start) / self.cache for ids in response_token_ids]
        return [-min(max(value, 0.0), 1.0) for value in excess]


class GymReward(ORM):
    """What the environment of the rollout gave, summed over the turns."""

    def __call__(
        self, _completions: list[str], rollout_infos: Sequence[dict[str, Any]], **_columns: Any
    ) -> list[float | None]:
        return [infos.get("total_reward") for infos in rollout_infos]
