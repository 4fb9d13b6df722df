"""TensorBoard event files. What a killed run wrote past its checkpoint is purged when it goes on."""

from collections.abc import Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from swift.train.trackers import markdown_table
from swift.train.tracking import SAMPLES_TAG, TrackedRun


class TensorBoardSink:
    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for tag, value in numbers.items():
            self.writer.add_scalar(tag, value, step)

    def write_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        self.writer.add_text(SAMPLES_TAG, markdown_table(rows), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, _: bool, /) -> None:
        self.writer.close()


def open_sink(run: TrackedRun) -> TensorBoardSink:
    directory = run.output.logging_dir or str(run.directory / "runs")
    return TensorBoardSink(SummaryWriter(directory, purge_step=run.step + 1 if run.step else None))
