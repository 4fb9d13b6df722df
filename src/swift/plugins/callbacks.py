"""What a callback hears of a training run, and what it may answer. Importing this costs nothing.

Callbacks see frozen events and cannot touch the loop: from any hook but `on_start` and `on_end` they may
return a wish, `Stop` or `Save`, which the loop follows at the end of the step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.plugins.registry import Registry


@dataclass(frozen=True)
class Stop:
    """The run shall end after this step, with a checkpoint."""

    reason: str


@dataclass(frozen=True)
class Save:
    """A checkpoint shall be written after this step."""


Wish = Stop | Save


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
    epoch: float = 0.0
    answers: tuple[dict[str, Any], ...] = ()  # of the rollout that it begins with: --log_completions


@dataclass(frozen=True)
class EvalEvent:
    step: int
    row: dict[str, Any]
    samples: tuple[dict[str, Any], ...] = ()  # some held-out answers as text, with their rewards


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
    """Override the hooks you need; made without arguments, on the first process alone."""

    def on_start(self, event: StartEvent) -> None:
        """Once, before the first step."""

    def on_step(self, event: StepEvent) -> Wish | None:
        """After every optimizer step."""

    def on_eval(self, event: EvalEvent) -> Wish | None:
        """After every evaluation."""

    def on_save(self, event: SaveEvent) -> Wish | None:
        """After every checkpoint, when it is complete on disk."""

    def on_end(self, event: EndEvent) -> None:
        """Once, also when the run was interrupted."""


callbacks_map: Registry[Any] = Registry("callback")  # classes or instances
extra_callbacks: list[Any] = []  # objects that take part in every run, without being named
