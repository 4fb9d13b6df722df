"""Events of a run, and the screen that shows them. Callbacks see frozen events and cannot touch the loop."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from swift.utils.log import console, say


@dataclass(frozen=True)
class StartEvent:
    run_directory: Path
    step: int
    total_steps: int


@dataclass(frozen=True)
class StepEvent:
    step: int
    loss: float  # of this step alone
    row: dict[str, Any] | None  # a line of the log, when one is due


@dataclass(frozen=True)
class EvalEvent:
    step: int
    row: dict[str, Any]


@dataclass(frozen=True)
class SaveEvent:
    step: int
    path: Path


@dataclass(frozen=True)
class EndEvent:
    step: int
    row: dict[str, Any]  # the closing summary
    finished: bool  # False when the run was interrupted


class Callback:
    """Override the hooks you need; users' plugins subclass this."""

    def on_start(self, event: StartEvent) -> None:
        """Once, before the first step."""

    def on_step(self, event: StepEvent) -> None:
        """After every optimizer step."""

    def on_eval(self, event: EvalEvent) -> None:
        """After every evaluation."""

    def on_save(self, event: SaveEvent) -> None:
        """After every checkpoint, when it is complete on disk."""

    def on_end(self, event: EndEvent) -> None:
        """Once, also when the run was interrupted."""


def format_row(row: dict[str, Any]) -> str:
    """A log row as one line for people, widths fixed so that columns line up."""
    parts = [f"step {row['global_step/max_steps']:>9}", f"loss {row['loss']:8.4f}"]
    if "token_acc" in row:
        parts.append(f"acc {row['token_acc']:.3f}")
    parts += [
        "skipped: float16 overflow" if row["grad_norm"] is None else f"grad {row['grad_norm']:7.3f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens/s']:8.0f} tok/s",
        f"{row['memory(GiB)']:5.2f} GiB",
        f"left {row['remaining_time']}",
    ]
    return "  ".join(parts)


class Screen(Callback):
    """One line for each logged step, above a progress bar where there is a terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=console(),
            transient=True,
            disable=not console().is_terminal,
        )
        self.task: TaskID | None = None

    def on_start(self, event: StartEvent) -> None:
        self.task = self.progress.add_task(
            "", total=event.total_steps, completed=event.step, loss=float("nan")
        )
        self.progress.start()

    def on_step(self, event: StepEvent) -> None:
        assert self.task is not None
        self.progress.update(self.task, completed=event.step, loss=event.loss)
        if event.row:
            say(format_row(event.row))

    def on_eval(self, event: EvalEvent) -> None:
        numbers = "  ".join(
            f"{k} {v:.4f}"
            for k, v in event.row.items()
            if k.startswith("eval_") and "_per_second" not in k and k != "eval_runtime"
        )
        say(f"eval at step {event.step}: {numbers}", style="cyan")

    def on_save(self, event: SaveEvent) -> None:
        say(f"saved {event.path}")

    def on_end(self, _: EndEvent) -> None:
        self.progress.stop()
