"""Known troubles of online learning, said in plain words when the log shows one (table in docs/grpo.md)."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from swift.plugins.callbacks import Callback, StepEvent
from swift.utils.log import warn

Row = dict[str, Any]
SILENCE = 20  # lines of the log before the same trouble is told again
MEMORY = 20  # lines of the log that a trend is measured over


@dataclass(frozen=True)
class Trouble:
    """What a line of the log, after those before it, says about the run; None = nothing."""

    name: str
    look: Callable[[Row, list[Row]], str | None]


def _equal_rewards(row: Row, _before: list[Row]) -> str | None:
    share = row.get("frac_reward_zero_std", 0.0)
    if share < 0.5:
        return None
    return (
        f"{share:.0%} of the groups got equal rewards, so {share:.0%} of this step taught nothing: raise "
        "--temperature or --num_generations, mix in harder (or easier) prompts, or --dynamic_sample true"
    )


def _nothing_right(row: Row, before: list[Row]) -> str | None:
    rows = [*before[-4:], row]
    if len(rows) < 5 or any(r.get("reward", 1.0) != 0 or r.get("reward_std", 1.0) != 0 for r in rows):
        return None
    return "every reward of the last 5 lines is 0: look at completions.jsonl (--log_completions true)"


def _cut(row: Row, _before: list[Row]) -> str | None:
    share = row.get("completions/clipped_ratio", 0.0)
    if share < 0.3:
        return None
    return (
        f"{share:.0%} of the answers were cut at --max_completion_length and never reached their end: raise "
        "it, reward shorter answers (soft_overlong), or --overlong_filter true"
    )


def _running_away(row: Row, before: list[Row]) -> str | None:
    now, then = row.get("completions/mean_length"), [r.get("completions/mean_length") for r in before]
    first = next((length for length in then if length), None)
    if now is None or first is None or now < 2 * first:
        return None
    return f"answers grew from {first:.0f} to {now:.0f} tokens: check that length alone earns no reward"


def _collapse(row: Row, before: list[Row]) -> str | None:
    now, then = row.get("entropy/mean"), [r.get("entropy/mean") for r in before]
    first = next((entropy for entropy in then if entropy), None)
    if now is None or first is None or now > 0.2 * first:
        return None
    return (
        f"entropy fell from {first:.3f} to {now:.3f}: answers become one answer. Raise --epsilon_high or "
        "--temperature, lower the learning rate, or add --beta"
    )


def _drift(row: Row, _before: list[Row]) -> str | None:
    kl = row.get("kl", 0.0)
    if kl < 1.0:
        return None
    return f"kl {kl:.2f} per token: far from the reference. Raise --beta or lower the learning rate"


def _clipped(row: Row, _before: list[Row]) -> str | None:
    share = row.get("clip_ratio/region_mean", 0.0)
    if share < 0.3:
        return None
    return (
        f"{share:.0%} of the tokens were outside the clip range and taught nothing: lower the learning rate, "
        "--num_iterations or --steps_per_generation"
    )


def _mismatch(row: Row, _before: list[Row]) -> str | None:
    kl = row.get("rollout/kl", 0.0)
    if kl < 0.05:
        return None
    return (
        f"the sampler's probabilities are not the trainer's (rollout/kl {kl:.3f}): "
        "--rollout_importance_sampling_mode token_truncate corrects for it; top_p or top_k below all tokens "
        "also cause it"
    )


TROUBLES = (
    Trouble("equal rewards", _equal_rewards),
    Trouble("nothing right", _nothing_right),
    Trouble("cut answers", _cut),
    Trouble("length", _running_away),
    Trouble("entropy", _collapse),
    Trouble("drift", _drift),
    Trouble("clipping", _clipped),
    Trouble("mismatch", _mismatch),
)


@dataclass
class Health(Callback):
    """Tells each trouble when it appears, and again only after a while."""

    rows: deque[Row] = field(default_factory=lambda: deque(maxlen=MEMORY))
    told: dict[str, int] = field(default_factory=dict)  # name -> lines until it may be told again

    def on_step(self, event: StepEvent) -> None:
        if event.row is None:
            return
        self.told = {name: left - 1 for name, left in self.told.items() if left > 1}
        for trouble in TROUBLES:
            found = trouble.look(event.row, list(self.rows))
            if found and trouble.name not in self.told:
                self.told[trouble.name] = SILENCE
                warn(f"step {event.step}: {found}")
        self.rows.append(event.row)
