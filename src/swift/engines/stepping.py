"""What every engine does around the micro-batches of a step: count units, fill up, fetch sums."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swift.batch import IGNORED, Batch
from swift.engines.protocol import Sums
from swift.engines.ranks import Ranks
from swift.objectives.types import LossSum

# One token, not trained: what a rank runs while others still have rows.
NOTHING = Batch(
    torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORED), torch.zeros(1, dtype=torch.int64), 1
)


def add_units(units: Sequence[dict[str, int]]) -> dict[str, int]:
    """Units of the whole step: what every term is divided by, however the step is cut up."""
    totals: dict[str, int] = {}
    for counts in units:
        for unit, count in counts.items():
            totals[unit] = totals.get(unit, 0) + count
    return totals


def collect_sums(results: Sequence[LossSum], units: Sequence[dict[str, int]]) -> Sums:
    """All sums of a step, fetched from the device at once. A loss stays a (sum, count) pair for each unit."""
    names: list[str] = []
    values: list[Tensor] = []
    for result, counts in zip(results, units, strict=True):
        for unit, term in result.terms.items():
            names.append(f"loss/{unit}")
            values += [term.detach().double(), term.new_tensor(counts[unit], dtype=torch.float64)]
        for name, (total, count) in result.metrics.items():
            names.append(name)
            values += [total.detach().double(), count.double()]
    sums = Sums()
    numbers = torch.stack(values).tolist() if values else []
    for name, total, count in zip(names, numbers[0::2], numbers[1::2], strict=True):
        sums.add(name, total, count)
    return sums


def gather_rows(values: Tensor, ranks: Ranks) -> tuple[Tensor, int]:
    """[N, ...] of all data ranks in their order, on the CPU, and where those of this one begin."""
    everyones = ranks.collect(values.cpu())
    parts = [everyones[speaker] for speaker in ranks.speakers]
    return torch.cat(parts), sum(len(part) for part in parts[: ranks.data_rank])
