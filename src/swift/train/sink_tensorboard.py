"""TensorBoard event files. What a killed run wrote past its checkpoint is purged when it goes on."""

from torch.utils.tensorboard import SummaryWriter

from swift.train.trackers import markdown_table
from swift.train.tracking import Rows, Sink, TrackedRun


def open_sink(run: TrackedRun) -> Sink:
    directory = run.output.logging_dir or str(run.directory / "runs")
    writer = SummaryWriter(directory, purge_step=run.step + 1 if run.step else None)

    def write(step: int, numbers: dict[str, float]) -> None:
        for tag, value in numbers.items():
            writer.add_scalar(tag, value, step)

    def write_table(tag: str, step: int, rows: Rows) -> None:
        writer.add_text(tag, markdown_table(rows), step)

    return Sink(write, write_table, lambda _: writer.close(), writer.flush)
