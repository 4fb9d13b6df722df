"""Which rows make up which step: a pure function of (seed, step). Resuming needs a step number only.

The global order depends on neither the number of processes nor the micro-batch size; both only cut it up.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """[num_rows] the order of one epoch. RandomState because numpy promises never to change it."""
    if not shuffle:
        return np.arange(num_rows)
    return np.random.RandomState([seed % 2**32, epoch]).permutation(num_rows)


@dataclass(frozen=True)
class StepPlan:
    """How an epoch is cut into optimizer steps, and a step into the micro-batches of each data rank."""

    num_rows: int
    micro_batch_size: int
    accumulation: int
    data_world: int = 1
    seed: int = 42
    shuffle: bool = True

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation * self.data_world

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller: no row is left out."""
        return math.ceil(self.num_rows / self.rows_per_step)

    def total_steps(self, epochs: float, max_steps: int) -> int:
        return max_steps if max_steps > 0 else math.ceil(epochs * self.steps_per_epoch)

    def step_rows(self, step: int) -> np.ndarray:
        """Row numbers of optimizer step `step` (counted from 0), over all ranks."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_rows, self.seed, epoch, self.shuffle)
        return order[index * self.rows_per_step : (index + 1) * self.rows_per_step]

    def micro_batches(self, step: int, data_rank: int = 0) -> list[np.ndarray]:
        """Row numbers of each micro-batch of one rank; fewer of them at the end of an epoch."""
        mine = self.step_rows(step)[data_rank :: self.data_world]
        return [mine[i : i + self.micro_batch_size] for i in range(0, len(mine), self.micro_batch_size)]
