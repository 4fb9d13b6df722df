"""Callbacks written for transformers' Trainer, as plugins of earlier tools bring them, in our loop.

They hear on_train_begin, on_step_end, on_log, on_evaluate, on_save and on_train_end with `args` (the run's
flags), `state` and `control`; no model, optimizer or data loader. `control.should_training_stop` and
`control.should_save` are followed. A callback that waits for anything else is refused.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from swift.config.option import ConfigError
from swift.plugins.callbacks import (
    Callback,
    EndEvent,
    EvalEvent,
    Save,
    SaveEvent,
    StartEvent,
    StepEvent,
    Stop,
    Wish,
    callbacks_map,
    extra_callbacks,
)

HEARD = {"on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end"}


def check_hf_callback(callback: TrainerCallback) -> None:
    """Raises ConfigError where it overrides a hook that is never called here."""
    hooks = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    kind = type(callback)
    silent = [n for n in hooks if n not in HEARD and getattr(kind, n) is not getattr(TrainerCallback, n)]
    if silent:
        raise ConfigError(
            f"the callback {kind.__name__} waits for {silent[0]}, which is not called here",
            hint=f"called are {', '.join(sorted(HEARD))}",
        )


def find_callbacks(names: Sequence[str]) -> list[Callback | TrainerCallback]:
    """The users' own, by --callbacks and from `extra_callbacks`. Raises ConfigError."""
    named = [callbacks_map.find(name) for name in names]
    found = [value() if isinstance(value, type) else value for value in (*named, *extra_callbacks)]
    for callback in found:
        if isinstance(callback, TrainerCallback):
            check_hf_callback(callback)
        elif not isinstance(callback, Callback):
            raise ConfigError(
                f"{type(callback).__name__} is not a callback", hint="derive it from swift.plugin.Callback"
            )
    return found


class HfCallbacks(Callback):
    def __init__(self, callbacks: Sequence[TrainerCallback], flags: dict[str, Any]) -> None:
        self.callbacks, self.args = callbacks, SimpleNamespace(**flags)
        self.state, self.control = TrainerState(), TrainerControl()

    def _call(self, hook: str, **words: Any) -> Wish | None:
        for callback in self.callbacks:
            answer = getattr(callback, hook)(self.args, self.state, self.control, **words)
            self.control = answer or self.control
        wishes_stop, wishes_save = self.control.should_training_stop, self.control.should_save
        self.control.should_save = False
        if wishes_stop:
            return Stop("a callback asked for it")
        return Save() if wishes_save else None

    def on_start(self, event: StartEvent) -> None:
        self.args.output_dir = str(event.run_directory)
        self.state.global_step, self.state.max_steps = event.step, event.total_steps
        self._call("on_train_begin")

    def on_step(self, event: StepEvent) -> Wish | None:
        self.state.global_step, self.state.epoch = event.step, event.epoch
        wish = self._call("on_step_end")
        if event.row is None:
            return wish
        self.state.log_history.append({**event.row, "step": event.step})
        return self._call("on_log", logs=event.row) or wish

    def on_eval(self, event: EvalEvent) -> Wish | None:
        self.state.log_history.append({**event.row, "step": event.step})
        return self._call("on_evaluate", metrics=event.row)

    def on_save(self, event: SaveEvent) -> Wish | None:
        """Checkpoints become whole beside training: the step told is theirs, which may have passed."""
        now, self.state.global_step = self.state.global_step, event.step
        wish = self._call("on_save")
        self.state.global_step = now
        return wish

    def on_end(self, _: EndEvent) -> None:
        self._call("on_train_end")
