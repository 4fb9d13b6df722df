"""Which parts of the assistant's turns are trained, and how strongly (`--loss_scale`).

Owns: the chain of names that the flag is, the weights that come with the package, as data. Not here: weights
of the user's own (a class in `loss_scale_map`, see plugins/hooks.py).
"""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from swift.config.option import ConfigError
from swift.plugins.hooks import LossScale, loss_scale_map
from swift.plugins.registry import unknown_name
from swift.template.types import Message, RenderError, Span

# Turns: every answer, those after the last question, or the whole text.
_BASES = ("default", "last_round", "all")
_OLD_NAMES = {"last_round_with_ignore_empty_think": "last_round+ignore_empty_think"}

# Weights of what a pattern matches.
_PATTERNS = {
    "ignore_empty_think": (re.compile(r"<think>\s*</think>\s*"), 0.0),
    "hermes": (re.compile(r"(?s)<tool_call>.+?</tool_call>"), 2.0),
}
# Weights of a keyword, and of what follows it up to the next one.
_REACT = {
    "Action:": (2.0, 2.0),
    "Action Input:": (2.0, 2.0),
    "Thought:": (1.0, 1.0),
    "Final Answer:": (1.0, 1.0),
    "Observation:": (2.0, 0.0),
}
_CALLS = ("Name:", "Action:", "ACTION:", "Tool:", "Command", "Arguments:", "action input", "ACTION_INPUT:")
_KEYWORDS = {
    "react": _REACT,
    "alpha_umi": {**_REACT, "Next:": (2.0, 2.0)},  # a typing error keeps Next: at 1 in ms-swift 3.7
    "agentflan": {**_REACT, **dict.fromkeys((*_CALLS, "Action Input:"), (1.0, 3.0))},
    "qwen": {
        "✿FUNCTION✿:": (2.0, 2.0),
        "✿ARGS✿:": (2.0, 2.0),
        "✿RETURN✿:": (1.0, 1.0),
        "✿RESULT✿:": (2.0, 0.0),
    },
}

# Words of a question whose whole answer has a weight of its own.
_QUESTIONS = {
    "agentflan": (
        ("What is the tool you want to use", "What are the required parameter names", "What is the value of"),
        3.0,
    )
}

_Pieces = list[tuple[str, float]]  # texts that follow each other, with their weights


@dataclass(frozen=True, slots=True)
class Weights:
    """`--loss_scale`, taken apart: which turns, and what multiplies the weight of their parts."""

    base: str
    parts: tuple[tuple[str, LossScale | None], ...]  # names; none = the table's own weights
    binary: bool

    def spans(
        self,
        text: str,
        turns: Sequence[tuple[int, int]],
        messages: Sequence[Message],
        end_of_turn: str | None,
    ) -> tuple[Span, ...]:
        """Spans with a weight above 0. `turns` has [start, end) of every assistant message, in order.

        The token that ends a turn has the turn's own weight: a model that never sees it never stops.
        """
        if self.base == "all":
            return tuple(self._cut(text, 0, len(text), 1.0, ""))
        spans: list[Span] = []
        weighed = turn_weights(messages, self.base)
        for (start, end), (weight, query) in zip(turns, weighed, strict=True):
            if weight <= 0 or start >= end:
                continue
            words_end = end
            if self.parts and end_of_turn and text.endswith(end_of_turn, start, end):
                words_end = end - len(end_of_turn)
            spans += self._cut(text, start, words_end, weight, query)
            if words_end < end:
                spans.append(self._span(words_end, end, weight))
        return tuple(_joined(spans))

    def _cut(self, text: str, start: int, end: int, weight: float, query: str) -> list[Span]:
        if not self.parts:
            return [self._span(start, end, weight)]
        words = text[start:end]
        factors = np.prod([_weigh(_pieces(*part, words, query)) for part in self.parts], axis=0)
        borders = sorted({0, *(np.flatnonzero(np.diff(factors)) + 1).tolist(), len(words)})
        return [
            self._span(start + first, start + last, weight * float(factors[first]))
            for first, last in pairwise(borders)
            if factors[first] > 0
        ]

    def _span(self, start: int, end: int, weight: float) -> Span:
        return Span(start, end, 1.0 if self.binary else weight)


def build_weights(loss_scale: str, *, binary: bool = False) -> Weights:
    """Raises ConfigError for a name that neither the package nor a plugin has."""
    base, parts = "default", []
    for name in _OLD_NAMES.get(loss_scale, loss_scale).split("+"):
        if name in _BASES:
            base = name
        elif name in loss_scale_map:  # first, so that a plugin can change what a name means
            parts.append((name, _build_own(name)))
        elif name in _PATTERNS or name in _KEYWORDS:
            parts.append((name, None))
        else:
            known = (*_BASES, *_OLD_NAMES, *_PATTERNS, *_KEYWORDS, *loss_scale_map)
            raise unknown_name("--loss_scale", name, known)
    return Weights(base, tuple(parts), binary)


def turn_weights(messages: Sequence[Message], base: str) -> list[tuple[float, str]]:
    """For every assistant message its weight and the question before it.

    A message's own "loss" or "loss_scale" wins over the flag.
    """
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    weights, query = [], ""
    for i, message in enumerate(messages):
        if message["role"] == "user":
            query = message["content"]
        if message["role"] != "assistant":
            continue
        if "loss" in message and not message["loss"]:
            weight = 0.0
        elif "loss_scale" in message:
            weight = float(message["loss_scale"])
        else:
            weight = 0.0 if base == "last_round" and i < last_user and "loss" not in message else 1.0
        weights.append((weight, query))
    return weights


def _build_own(name: str) -> LossScale:
    value: Any = loss_scale_map.find(name)
    own = value() if isinstance(value, type) else value
    if not isinstance(own, LossScale):
        raise ConfigError(f"--loss_scale {name}: {type(own).__name__} is not a LossScale")
    try:
        inspect.signature(own.get_loss_scale).bind("", query="")
    except TypeError as error:
        raise ConfigError(
            f"--loss_scale {name}: {type(own).__name__}.get_loss_scale does not take (context, query)"
        ) from error
    return own


def _pieces(name: str, own: LossScale | None, words: str, query: str) -> _Pieces:
    if own is None:
        asked, weight = _QUESTIONS.get(name, ((), 1.0))
        if any(question in query for question in asked):
            return [(words, weight)]
        return _by_pattern(name, words) if name in _PATTERNS else _by_keyword(name, words)
    try:
        texts, weights = own.get_loss_scale(words, query=query)
        pieces = [(text, float(weight)) for text, weight in zip(texts, weights, strict=True)]
    except Exception as error:  # a plugin is a stranger's program
        raise RenderError(f"--loss_scale {name} fails: {type(error).__name__}: {error}") from error
    if "".join(text for text, _ in pieces) != words:
        raise RenderError(f"--loss_scale {name} returns parts that are not the answer")
    return pieces


def _by_pattern(name: str, words: str) -> _Pieces:
    pattern, weight = _PATTERNS[name]
    pieces: _Pieces = []
    position = 0
    for match in pattern.finditer(words):
        pieces += [(words[position : match.start()], 1.0), (match.group(), weight)]
        position = match.end()
    return [*pieces, (words[position:], 1.0)]


def _by_keyword(name: str, words: str) -> _Pieces:
    keywords = _KEYWORDS[name]
    parts = re.split("(" + "|".join(map(re.escape, keywords)) + ")", words)
    pieces: _Pieces = [(parts[0], 1.0)]
    for keyword, following in zip(parts[1::2], parts[2::2], strict=True):
        own, after = keywords[keyword]
        pieces += [(keyword, own), (following, after)]
    return pieces


def _weigh(pieces: _Pieces) -> np.ndarray:
    """[characters] the weight of each."""
    return np.repeat([weight for _, weight in pieces], [len(text) for text, _ in pieces])


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbours of equal weight as one span."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].end == span.start and joined[-1].weight == span.weight:
            joined[-1] = Span(joined[-1].start, span.end, span.weight)
        else:
            joined.append(span)
    return joined
