"""The seam between training loops and parallel machinery. Loops know these methods and nothing below them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from swift.batch import Batch
from swift.objectives.types import Objective, TokenStats


def extreme_of(name: str) -> Callable[[list[float]], float] | None:
    """How values of a metric come together that are no sums. A slash keeps out names that users choose."""
    group, _, last = name.rpartition("/")
    words = last.split("_") if group else ()
    return min if "min" in words else max if "max" in words else None


@dataclass
class Sums:
    """Metrics as (sum, count) pairs. They add up over micro-batches, steps and ranks; means do not.

    A pair with count 0 is a plain total, such as the number of tokens, and has no mean. A name such as
    entropy/min or completions/max_length is that of an extreme: the least or the largest value is kept, with
    count 1, or with 0 as long as there is none.
    """

    pairs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        before = self.pairs.get(name, (0.0, 0.0))
        pick = extreme_of(name)
        if pick is None:
            self.pairs[name] = (before[0] + total, before[1] + count)
        else:
            values = [value for value, is_there in (before, (total, count)) if is_there]
            self.pairs[name] = (pick(values), 1.0) if values else (0.0, 0.0)

    def merge(self, other: "Sums") -> None:
        for name, (total, count) in other.pairs.items():
            self.add(name, total, count)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.pairs.items() if count}


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did."""

    grad_norm: float  # before clipping
    learning_rate: float  # that this step used
    applied: bool = True  # False: float16 gradients overflowed, and the weights stayed as they were


@dataclass(frozen=True)
class Snapshot:
    """What one rank has to write. `write` gives its files, exchanges nothing and may run beside training.

    `finish` is called on rank 0 alone, when the files of all ranks are there.
    """

    bytes: int
    write: Callable[[], list[Path]]
    finish: Callable[[], None] | None = None


class Engine(Protocol):
    """A model that can be scored, trained and saved, whatever it is spread over."""

    data_rank: int
    data_world: int
    dtype: torch.dtype  # of the weights
    device: torch.device
    flat: bool  # whether batches have no padding
    num_parameters: tuple[int, int]  # trained and all, of the whole model

    def forward(self, batches: Sequence[Batch], needs: frozenset[str]) -> list[TokenStats]:
        """Stats without gradients, one for each batch."""
        ...

    def forward_backward(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        """Gradients of all micro-batches of one optimizer step, over the step's global unit counts."""
        ...

    def measure(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        """The objective's loss and metrics without gradients, dropout off."""
        ...

    def optim_step(self) -> StepInfo:
        """Clips, steps, advances the schedule and clears the gradients."""
        ...

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        """[N, ...] rows of every data rank, which may give differently many, and where its own begin."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside it `forward` answers as the model did before training."""
        ...

    def generating(self) -> AbstractContextManager[nn.Module]:
        """The model as it is trained, whole on every rank, to answer with; entered by all ranks together.

        In evaluation mode, under the arithmetic of training, attending by FLAT_ATTENTION. Inside, each rank
        calls it as often as it likes. Raises ConfigError where that is not possible.
        """
        ...

    def set_aside(self, *, weights: bool, moments: bool) -> AbstractContextManager[None]:
        """Inside it the GPU's memory of weights, or of the optimizer, is free. Nothing to free on a CPU."""
        ...

    def drop_reference(self) -> None:
        """Frees what only `reference` needs: nothing will ask for it any more."""
        ...

    def mix_reference(self, share: float) -> None:
        """From now on the reference is `share` of the model as it is and the rest what it was."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name in HuggingFace's files, whole tensor), adapters merged; one at a time, good until the next.

        All ranks go through all of it, in one order. Raises ConfigError where weights are quantised.
        """
        ...

    def save(self, path: Path, *, resumable: bool) -> Snapshot:
        """Weights in HF format for `path`; with `resumable` also optimizer, schedule and random states.

        Called by all ranks. What training changes is copied before this returns.
        """
        ...
