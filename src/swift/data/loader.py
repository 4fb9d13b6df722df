"""Which rows make up which step: a pure function of (seed, step). Resuming needs a step number only.

The global order depends on neither the number of processes nor the micro-batch size; both only cut it up.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from swift.data.pack import Packs


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """[count] the order of one epoch. RandomState because numpy promises never to change it."""
    if not shuffle:
        return np.arange(count)
    return np.random.RandomState([seed % 2**32, epoch]).permutation(count)


@lru_cache(maxsize=2)
def epoch_packs(packs: Packs, seed: int, epoch: int) -> Packs:
    return packs.with_new_neighbours(seed, epoch)


@dataclass(frozen=True)
class StepPlan:
    """How an epoch is cut into optimizer steps, and a step into the micro-batches of each data rank.

    Sizes count items: rows, or packs where there are some.
    """

    num_rows: int
    micro_batch_size: int
    accumulation: int
    data_world: int = 1
    seed: int = 42
    shuffle: bool = True
    packs: Packs | None = None
    drop_last: bool = False

    @property
    def num_items(self) -> int:
        return self.num_rows if self.packs is None else len(self.packs)

    @property
    def items_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation * self.data_world

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller: no item is left out, unless `drop_last`."""
        if self.drop_last:
            return self.num_items // self.items_per_step
        return math.ceil(self.num_items / self.items_per_step)

    def total_steps(self, epochs: float, max_steps: int) -> int:
        return max_steps if max_steps > 0 else math.ceil(epochs * self.steps_per_epoch)

    def micro_batches(self, step: int, data_rank: int = 0) -> list[np.ndarray]:
        """Row numbers of each micro-batch of one rank, fewer at the end of an epoch. Steps count from 0."""
        mine, size = self._items(step)[data_rank :: self.data_world], self.micro_batch_size
        return [self._rows_of(mine[i : i + size], step) for i in range(0, len(mine), size)]

    def step_rows(self, step: int) -> np.ndarray:
        """All row numbers of a step, in an order that does not depend on how the step is cut up."""
        return self._rows_of(self._items(step), step)

    def _items(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_items, self.seed, epoch, self.shuffle)
        return order[index * self.items_per_step : (index + 1) * self.items_per_step]

    def _rows_of(self, items: np.ndarray, step: int) -> np.ndarray:
        if self.packs is None:
            return items
        epoch = step // self.steps_per_epoch
        packs = epoch_packs(self.packs, self.seed, epoch) if self.shuffle else self.packs
        return np.concatenate([packs[i] for i in items])
