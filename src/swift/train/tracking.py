"""--report_to: the numbers of a run, sent to TensorBoard, Weights & Biases, SwanLab or MLflow.

Owns: which trackers there are, the callback that feeds one, the names by which a resumed run is found again.
Not here: each tracker's own calls (sink_*.py), which are imported when they are asked for.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError
from swift.config.schedule import OutputConfig
from swift.models.directory import read_json
from swift.plugins.callbacks import Callback, EndEvent, EvalEvent, SaveEvent, StartEvent, StepEvent
from swift.train.trackers import tagged
from swift.utils.files import write_json

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "swanlab": "swanlab>=0.10",
    "mlflow": "mlflow",
}
IDS = "trackers.json"
SAMPLES_TAG, ANSWERS_TAG = "eval/samples", "train/completions"
SHOWN = 32  # answers of a rollout
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Sink:
    write: Callable[[int, dict[str, float]], object]  # numbers of a step
    write_table: Callable[[str, int, Rows], object]  # tag, step, some answers and their rewards
    close: Callable[[bool], object]  # whether the run was finished
    flush: Callable[[], object] = lambda: None  # most write by themselves


@dataclass(frozen=True)
class TrackedRun:
    directory: Path
    output: OutputConfig
    flags: dict[str, Any]  # without secrets
    step: int = 0  # after which it goes on

    @property
    def name(self) -> str:
        return self.output.run_name or self.directory.name

    def identity(self, tracker: str) -> str | None:
        """The tracker's own name for this run, None before it has one."""
        path = self.directory / IDS
        return read_json(path).get(tracker) if path.exists() else None

    def keep_identity(self, tracker: str, identity: str) -> None:
        """Writes that name into the run directory, so that a resumed run goes on under it."""
        path = self.directory / IDS
        known = read_json(path) if path.exists() else {}
        write_json(path, {**known, tracker: identity})


Opener = Callable[[TrackedRun], Sink]


def load_trackers(names: Iterable[str]) -> list[Opener]:
    """How to open each tracker. Raises ConfigError where its package is not installed.

    `all` stands for those that are installed.
    """
    wanted = list(dict.fromkeys(names))
    found = []
    for name in PACKAGES if "all" in wanted else [n for n in wanted if n != "none"]:
        try:
            found.append(import_module(f"swift.train.sink_{name}").open_sink)
        except ModuleNotFoundError as error:
            if "all" not in wanted:
                raise ConfigError(
                    f"--report_to {name} needs a package that is not installed ({error.name})",
                    hint=f"pip install '{PACKAGES[name]}'",
                ) from error
    return found


def show_messages(messages: Rows) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


class Tracking(Callback):
    sink: Sink  # from the start of the run on

    def __init__(self, opener: Opener, run: TrackedRun) -> None:
        self.opener, self.run = opener, run

    def on_start(self, event: StartEvent) -> None:
        self.sink = self.opener(replace(self.run, step=event.step))

    def on_step(self, event: StepEvent) -> None:
        if event.row:
            self.sink.write(event.step, tagged(event.row))
        if event.answers:
            rows = [{**answer, "prompt": show_messages(answer["prompt"])} for answer in event.answers]
            if self.run.flags.get("wandb_log_unique_prompts"):
                rows = list({row["prompt"]: row for row in rows[::-1]}.values())[::-1]
            self.sink.write_table(ANSWERS_TAG, event.step, rows[:SHOWN])

    def on_eval(self, event: EvalEvent) -> None:
        self.sink.write(event.step, tagged(event.row))
        if event.samples:
            self.sink.write_table(SAMPLES_TAG, event.step, event.samples)

    def on_save(self, _: SaveEvent) -> None:
        self.sink.flush()

    def on_end(self, event: EndEvent) -> None:
        self.sink.close(event.finished)
