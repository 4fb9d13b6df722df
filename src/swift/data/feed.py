"""What the training loop learns from, step by step: rows at hand, or a stream of them.

The global order of rows depends on neither the number of processes nor the micro-batch size.
"""

from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from swift.batch import Batch
from swift.data.collate import collate_rows, mismatch_rows
from swift.data.encode import EncodedDataset
from swift.data.loader import StepPlan
from swift.data.stream import EncodedStream, Item, gather_rows
from swift.utils.log import say


@dataclass(frozen=True)
class StoredFeed:
    """Encoded rows in the order of a plan. Steps count from 0."""

    rows: EncodedDataset
    plan: StepPlan

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def batches(self, step: int, data_rank: int, /) -> list[Batch]:
        """The micro-batches of one rank."""
        return [collate_rows(self.rows, numbers) for numbers in self.plan.micro_batches(step, data_rank)]

    def mismatched(self, step: int, data_rank: int, /) -> list[Batch]:
        """The same micro-batches with answers to other prompts of the step."""
        return mismatch_rows(self.rows, self.plan.micro_batches(step, data_rank), self.plan.step_rows(step))

    def epoch(self, step: int, /) -> float:
        """Passes over the rows before this step."""
        return step / self.plan.steps_per_epoch

    def rows_until(self, step: int, /) -> float:
        """Rows in all steps before this one."""
        return step * len(self.rows) / self.plan.steps_per_epoch

    def progress(self) -> dict[str, int]:
        """More for a line of the log."""
        return {}

    def describe(self) -> str:
        """The rows, for the summary of the run."""
        return describe_lengths(self.rows)

    def position(self) -> None:
        """What a checkpoint has to keep besides the step."""
        return None

    def identity(self) -> dict[str, Any]:
        """What must be the same where a run goes on, and on every rank."""
        return {
            "rows": len(self.rows),
            "rows_per_step": self.plan.items_per_step,
            "tokens": self.rows.num_tokens,
            "fingerprint": self.rows.fingerprint,
            "packs": self.plan.packs and self.plan.packs.fingerprint,
        }

    def close(self) -> None:
        """Once, after the last step."""


@dataclass(eq=False)
class StreamFeed:
    """Items of a stream as they come: as StoredFeed, but steps are asked for in order, each once."""

    stream: EncodedStream
    micro_batch_size: int
    accumulation: int
    data_world: int = 1
    next_step: int = 0
    steps_per_epoch: None = None  # nobody knows
    # Of the last step: its rows, and which of them each micro-batch has.
    _step_rows: tuple[EncodedDataset, list[np.ndarray]] = field(init=False)

    @property
    def items_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation * self.data_world

    def batches(self, step: int, data_rank: int, /) -> list[Batch]:
        assert step == self.next_step, (step, self.next_step)
        self.next_step += 1
        items: list[Item] = []
        while len(items) < self.items_per_step:
            item = self.stream.next_item()
            if item is not None:
                items.append(item)
            elif items:
                break  # the last step of a pass is smaller, as without streaming
        rows = gather_rows(list(chain.from_iterable(items)), self.stream.shape)
        numbers = np.split(np.arange(len(rows)), np.cumsum([len(item) for item in items])[:-1])
        mine, size = numbers[data_rank :: self.data_world], self.micro_batch_size
        chosen = [np.concatenate(mine[i : i + size]) for i in range(0, len(mine), size)]
        self._step_rows = rows, chosen
        return [collate_rows(rows, one) for one in chosen]

    def mismatched(self, _step: int, _data_rank: int, /) -> list[Batch]:
        rows, chosen = self._step_rows
        return mismatch_rows(rows, chosen, np.arange(len(rows)))

    def epoch(self, _step: int, /) -> float:
        return float(self.stream.position.epoch)

    def rows_until(self, _step: int, /) -> float:
        return self.stream.read - self.stream.dropped.total()

    def progress(self) -> dict[str, int]:
        return {"rows_read": self.stream.read, "rows_dropped": self.stream.dropped.total()}

    def describe(self) -> str:
        reasons = "".join(f"; {count} {reason}" for reason, count in self.stream.dropped.most_common())
        return f"{self.stream.read} rows read, {self.stream.dropped.total()} dropped{reasons}"

    def position(self) -> dict[str, Any]:
        return asdict(self.stream.position)

    def identity(self) -> dict[str, Any]:
        return {"rows_per_step": self.items_per_step, "fingerprint": self.stream.fingerprint}

    def close(self) -> None:
        say(f"stream: {self.describe()}")
        self.stream.close()


Feed = StoredFeed | StreamFeed


def describe_lengths(rows: EncodedDataset) -> str:
    """`193.38±32.78, min=141.00, max=270.00, size=26`: tokens a row."""
    lengths = rows.lengths
    spread = f"{lengths.mean():.2f}±{lengths.std():.2f}, min={lengths.min():.2f}, max={lengths.max():.2f}"
    return f"{spread}, size={len(rows)}"
