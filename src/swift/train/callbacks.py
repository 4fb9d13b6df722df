"""Callbacks that come with the package: the screen, and stopping early."""

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from swift.plugins.callbacks import Callback, EndEvent, EvalEvent, SaveEvent, StartEvent, StepEvent, Stop
from swift.train.saving import is_better
from swift.utils.files import read_jsonl
from swift.utils.log import console, say


def format_row(row: dict[str, Any]) -> str:
    """A log row as one line for people, widths fixed so that columns line up."""
    parts = [f"step {row['global_step/max_steps']:>9}", f"loss {row['loss']:8.4f}"]
    if "token_acc" in row:
        parts.append(f"acc {row['token_acc']:.3f}")
    if "reward" in row:
        parts.append(f"reward {row['reward']:6.3f}  length {row['completions/mean_length']:6.1f}")
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

    def __init__(self, *, bar: bool = True) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=console(),
            transient=True,
            disable=not (bar and console().is_terminal),
        )

    def on_start(self, event: StartEvent) -> None:
        self.task = self.progress.add_task(
            "", total=event.total_steps, completed=event.step, loss=float("nan")
        )
        self.progress.start()

    def on_step(self, event: StepEvent) -> None:
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


class EarlyStop(Callback):
    """Ends a run whose evaluations have not improved `patience` times in a row.

    What was evaluated before a resumed run went on is read from its log, which has been cut to that step.
    """

    def __init__(self, log: Path, *, metric: str, lower_is_better: bool, patience: int) -> None:
        self.log, self.metric, self.lower_is_better, self.patience = log, metric, lower_is_better, patience
        self.best: float | None = None
        self.count = 0  # evaluations since the best one

    def on_start(self, _: StartEvent) -> None:
        for row in read_jsonl(self.log) if self.log.exists() else []:
            if self.metric in row:
                self._hear(row[self.metric])

    def _hear(self, value: float) -> None:
        if is_better(value, self.best, self.lower_is_better):
            self.best, self.count = value, 0
        else:
            self.count += 1

    def on_eval(self, event: EvalEvent) -> Stop | None:
        self._hear(event.row[self.metric])
        if self.count < self.patience:
            return None
        return Stop(
            f"{self.metric} has not improved on {self.best:.4f} in {self.count} evaluations "
            f"(--early_stop_interval {self.patience})"
        )
