"""What a run is measured by between its steps: the objective on rows that it does not train on."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from swift.data.collate import collate_rows, mismatch_rows
from swift.data.encode import EncodedDataset
from swift.data.feed import describe_lengths
from swift.engines.protocol import Engine, Sums
from swift.train.method import Method
from swift.train.scoring import Step
from swift.train.state import TrainState


@dataclass(frozen=True)
class Found:
    """What an evaluation has measured, over `rows` rows in `steps` batches of one process."""

    sums: Sums
    rows: int
    steps: int
    samples: tuple[dict[str, Any], ...] = ()  # some answers as text, with their rewards


class Evaluation(Protocol):
    """Measured by all ranks together."""

    def measure(self, state: TrainState) -> Found: ...

    def describe(self) -> str:
        """The rows, for the summary of the run."""
        ...


@dataclass(frozen=True)
class RowEvaluation:
    """The objective on rows at hand."""

    engine: Engine
    method: Method
    rows: EncodedDataset
    batch_size: int
    limit: int | None = None  # rows that are looked at; none = all
    shown: Sequence[dict[str, str]] = ()  # the first rows as text, whose rewards are told

    def measure(self, state: TrainState) -> Found:
        size, rank, world = self.batch_size, self.engine.data_rank, self.engine.data_world
        count = len(self.rows) if self.limit is None else min(len(self.rows), self.limit)
        first = len(self.shown)  # these rows are alone in their batches, on the first rank
        alone = range(first if rank == 0 else 0)
        mine = range(first + rank * size, count, world * size)
        chosen = [range(i, i + 1) for i in alone] + [range(s, min(s + size, count)) for s in mine]
        batches = [collate_rows(self.rows, rows) for rows in chosen]
        asked = self.method.needs_mismatched
        mismatched = mismatch_rows(self.rows, chosen, np.arange(count)) if asked else []
        batches = self.method.score(self.engine, Step(batches, mismatched, copy.deepcopy(state.running)))
        sums = self.engine.measure(batches[len(alone) :], self.method.objective)
        samples = []
        for i, texts in enumerate(self.shown):
            found = self.engine.measure(batches[i : i + 1] if alone else [], self.method.objective)
            rewards = {k: v for k, v in found.means().items() if k.startswith("rewards/")}
            samples.append({**texts, **rewards})
            sums.merge(found)
        return Found(sums, count, math.ceil(count / size), tuple(samples))

    def describe(self) -> str:
        return describe_lengths(self.rows)
