"""Where a run stands: all of the loop's own state, small enough for a JSON file."""

from dataclasses import asdict, dataclass, field
from typing import Any

from swift.engines.protocol import Sums


@dataclass
class TrainState:
    """Changed by the loop only. `window` holds the sums since the last log row, so a resumed log is equal."""

    step: int = 0
    window: Sums = field(default_factory=Sums)
    whole: Sums = field(default_factory=Sums)  # of the whole run, for the closing summary
    running: Sums = field(default_factory=Sums)  # means over the whole run that an objective reads
    tokens: int = 0
    elapsed_seconds: float = 0.0  # training time of all processes that worked on this run
    skipped_steps: int = 0  # steps whose float16 gradients overflowed
    best_metric: float | None = None
    best_step: int | None = None
    last_saved_step: int | None = None
    position: dict[str, Any] | None = None  # in a stream of rows; none = the step says it

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        def sums(name: str) -> Sums:
            return Sums({k: (float(v[0]), float(v[1])) for k, v in values[name]["pairs"].items()})

        return cls(**{**values, **{name: sums(name) for name in ("window", "whole", "running")}})


def loss_and_metrics(sums: Sums) -> dict[str, float]:
    """Means ready for a log line: `loss` is the sum of its terms' means, the rest goes by its own name."""
    means = sums.means()
    terms = [v for k, v in means.items() if k.startswith("loss/")]
    liked, disliked = means.get("rewards/chosen"), means.get("rewards/rejected")
    if liked is not None and disliked is not None:  # of answers that come one at a time
        means.setdefault("rewards/margins", liked - disliked)
    return {"loss": sum(terms), **{k: v for k, v in means.items() if not k.startswith("loss/")}}


def format_seconds(seconds: float) -> str:
    """`1d 5h 4m 23s`, leading zeros left out."""
    rest = round(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join([*parts, f"{rest}s"])
