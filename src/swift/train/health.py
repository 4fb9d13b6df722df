"""Known troubles of online learning, said in plain words when the log shows one (table in docs/grpo.md)."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from swift.plugins.callbacks import Callback, StepEvent
from swift.utils.log import warn

Row = dict[str, Any]
SILENCE = 20  # lines of the log before the same trouble is told again
MEMORY = 20  # lines of the log that a trend is measured over


@dataclass(frozen=True)
class Trouble:
    """A number of the log that is `least` or more, and what that says about the run."""

    key: str
    least: float
    said: str

    def look(self, row: Row, _before: list[Row]) -> str | None:
        value = row.get(self.key, 0.0)
        return self.said.format(value=value) if value >= self.least else None


@dataclass(frozen=True)
class Trend:
    """A number that has become `factor` times what it was, or more; less where that is below 1."""

    key: str
    factor: float
    said: str

    def look(self, row: Row, before: list[Row]) -> str | None:
        now, first = row.get(self.key), next((r[self.key] for r in before if r.get(self.key)), None)
        if now is None or first is None:
            return None
        is_far = now >= self.factor * first if self.factor > 1 else now <= self.factor * first
        return self.said.format(first=first, now=now) if is_far else None


class NothingRight:
    key = "reward"

    def look(self, row: Row, before: list[Row]) -> str | None:
        rows = [*before[-4:], row]
        if len(rows) < 5 or any(r.get("reward", 1.0) != 0 or r.get("reward_std", 1.0) != 0 for r in rows):
            return None
        return "every reward of the last 5 lines is 0: look at completions.jsonl (--log_completions true)"


TROUBLES = (
    Trouble(
        "frac_reward_zero_std", 0.5,
        "{value:.0%} of the groups got equal rewards, so {value:.0%} of this step taught nothing: raise "
        "--temperature or --num_generations, mix in harder (or easier) prompts, or --dynamic_sample true",
    ),
    NothingRight(),
    Trouble(
        "completions/clipped_ratio", 0.3,
        "{value:.0%} of the answers were cut at --max_completion_length and never reached their end: raise "
        "it, reward shorter answers (soft_overlong), or --overlong_filter true",
    ),
    Trend(
        "completions/mean_length", 2.0,
        "answers grew from {first:.0f} to {now:.0f} tokens: check that length alone earns no reward",
    ),
    Trend(
        "entropy/mean", 0.2,
        "entropy fell from {first:.3f} to {now:.3f}: answers become one answer. Raise --epsilon_high or "
        "--temperature, lower the learning rate, or add --beta",
    ),
    Trouble(
        "kl", 1.0,
        "kl {value:.2f} per token: far from the reference. Raise --beta or lower the learning rate",
    ),
    Trouble(
        "clip_ratio/region_mean", 0.3,
        "{value:.0%} of the tokens were outside the clip range and taught nothing: lower the learning rate, "
        "--num_iterations or --steps_per_generation",
    ),
    Trouble(
        "rollout/kl", 0.05,
        "the sampler's probabilities are not the trainer's (rollout/kl {value:.3f}): "
        "--rollout_importance_sampling_mode token_truncate corrects for it; top_p or top_k below all tokens "
        "also cause it",
    ),
)  # fmt: skip


@dataclass
class Health(Callback):
    """Tells each trouble when it appears, and again only after a while."""

    rows: deque[Row] = field(default_factory=lambda: deque(maxlen=MEMORY))
    told: dict[str, int] = field(default_factory=dict)  # key -> lines until it may be told again

    def on_step(self, event: StepEvent) -> None:
        if event.row is None:
            return
        self.told = {key: left - 1 for key, left in self.told.items() if left > 1}
        for trouble in TROUBLES:
            found = trouble.look(event.row, list(self.rows))
            if found and trouble.key not in self.told:
                self.told[trouble.key] = SILENCE
                warn(f"step {event.step}: {found}")
        self.rows.append(event.row)
