"""The loop of every method: batches, gradients, step, log, evaluate, save."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from swift.config.schedule import ScheduleConfig
from swift.data.feed import Feed
from swift.engines.protocol import Engine, StepInfo, Sums
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
)
from swift.train.evaluation import Evaluation
from swift.train.method import Method
from swift.train.saving import Saver
from swift.train.scoring import Step
from swift.train.state import TrainState, format_seconds, loss_and_metrics
from swift.train.stopping import FAILED, INTERRUPT, TERMINATE, Terminated
from swift.utils.beat import beat, rest
from swift.utils.log import say


@dataclass(frozen=True)
class Cadence:
    strategy: str
    every: int
    steps_per_epoch: int | None
    total_steps: int

    @classmethod
    def of(cls, strategy: str, every: float, steps_per_epoch: int | None, total_steps: int) -> "Cadence":
        """`every` below 1 is a share of all steps."""
        count = math.ceil(every * total_steps) if 0 < every < 1 else int(every)
        return cls(strategy, max(count, 1), steps_per_epoch, total_steps)

    def due(self, step: int) -> bool:
        """The last step is always due, unless the strategy is `no`."""
        if self.strategy == "no":
            return False
        every = self.every
        if self.strategy == "epoch":
            assert self.steps_per_epoch is not None
            every = self.steps_per_epoch
        return step % every == 0 or step == self.total_steps


@dataclass(frozen=True)
class Loop:
    """Everything that one run needs, composed by the caller."""

    engine: Engine
    method: Method
    feed: Feed
    evaluation: Evaluation | None
    total_steps: int
    schedule: ScheduleConfig
    saver: Saver
    callbacks: Sequence[Callback]
    run_directory: Path
    follows_wishes: bool = False  # whether a callback may ask for something; the same on every rank
    observe: Callable[[float], Sums] | None = None  # seconds of a step's update -> more for its line
    answers: Callable[[], tuple[dict[str, Any], ...]] = tuple  # of a rollout, once
    wishes: list[Wish] = field(default_factory=list)

    def run(self, state: TrainState) -> None:
        """Trains from `state` to the end. An interrupt is told to the callbacks and passed on."""
        clock = Clock(state)
        self._tell("on_start", StartEvent(self.run_directory, state.step, self.total_steps))
        finished = False
        try:
            if self.schedule.eval_on_start and self.evaluation and state.step == 0:
                self._evaluate(state)
            stop = None
            while state.step < self.total_steps and stop is None:
                stop = self._train_step(state, clock)
                self._heed(state, clock)
            if stop:
                say(f"stopped after step {state.step}: {stop.reason}")
            beat("the last checkpoint")
            self.saver.wait()
            self._tell_saved()
            finished = True
        except BaseException:
            self.saver.settle()
            raise
        finally:
            rest()
            self._tell("on_end", EndEvent(state.step, self._summary(state, clock), finished))

    def _tell(self, hook: str, event: object) -> None:
        for callback in self.callbacks:
            wish = getattr(callback, hook)(event)
            if wish is not None:
                self.wishes.append(wish)

    def _take_wishes(self) -> list[Wish]:
        """What callbacks have asked for since the last time, on every rank."""
        if not self.follows_wishes:
            return []
        taken = self.saver.ranks.share(list(self.wishes))
        self.wishes.clear()
        return taken

    def _train_step(self, state: TrainState, clock: "Clock") -> Stop | None:
        """One optimizer step and what is due after it; the wish of a callback to end the run."""
        rank, asked = self.engine.data_rank, self.method.needs_mismatched
        with clock.training():
            beat(f"step {state.step + 1}: rows or answers")
            batches = self.feed.batches(state.step, rank)
            mismatched = self.feed.mismatched(state.step, rank) if asked else []
            batches = self.method.score(self.engine, Step(batches, mismatched, state.running))
            started = time.perf_counter()
            beat(f"step {state.step + 1}: forward and backward")
            sums = self.engine.forward_backward(batches, self.method.objective)
            beat(f"step {state.step + 1}: optimizer")
            info = self.engine.optim_step()
        if self.observe:
            sums.merge(self.observe(time.perf_counter() - started))
        state.step += 1
        if self.method.mix_every and state.step % self.method.mix_every == 0:
            self.engine.mix_reference(self.method.mix_share)
        state.skipped_steps += not info.applied
        state.tokens += int(sums.pairs["tokens"][0])
        state.window.merge(sums)
        state.whole.merge(sums)
        state.elapsed_seconds = clock.elapsed()
        row = self._log_row(state, info, clock) if self._log_due(state.step) else None
        loss = loss_and_metrics(sums)["loss"]
        self._tell("on_step", StepEvent(state.step, loss, row, self._epoch(state), self.answers()))
        metric = self._evaluate(state) if self._eval_due(state) else None
        wishes = self._take_wishes()
        saves = self.schedule.save_strategy != "no"
        if self._cadence("save").due(state.step) or Save() in wishes or (saves and wishes):
            self._save(state, clock, metric)
        return next((wish for wish in wishes if isinstance(wish, Stop)), None)

    def _save(self, state: TrainState, clock: "Clock", metric: float | None) -> None:
        state.elapsed_seconds = clock.elapsed()
        state.position = self.feed.position()
        beat(f"step {state.step}: checkpoint")
        self.saver.save(self.engine, state, metric, self.schedule.lower_is_better)

    def _tell_saved(self) -> None:
        for path in self.saver.take_whole():
            self._tell("on_save", SaveEvent(int(path.name.split("-")[1]), path))

    def _heed(self, state: TrainState, clock: "Clock") -> None:
        """Between two steps: checkpoints that are whole are told, and flags of any rank stop all of them."""
        self._tell_saved()
        flags = self.saver.ranks.flagged()
        if flags & FAILED:
            self.saver.raise_failure()
        if flags & INTERRUPT:
            raise KeyboardInterrupt
        if flags & TERMINATE and state.step < self.total_steps:
            if state.last_saved_step != state.step and self.schedule.save_strategy != "no":
                self._save(state, clock, None)
            self.saver.wait()
            self._tell_saved()
            raise Terminated

    def _log_due(self, step: int) -> bool:
        cadence = self._cadence("logging")
        return cadence.due(step) or (step == 1 and cadence.strategy != "no")

    def _eval_due(self, state: TrainState) -> bool:
        cadence = self._cadence("eval")
        passed = self._epoch(state) if cadence.strategy == "epoch" else state.step
        return cadence.due(state.step) and passed >= self.schedule.eval_delay

    def _cadence(self, what: str) -> Cadence:
        s = self.schedule
        strategy = s.eval_strategy or ("steps" if s.eval_steps else s.save_strategy)
        strategy, every = {
            "save": (s.save_strategy, s.save_steps),
            "logging": (s.logging_strategy, s.logging_steps),
            "eval": (strategy if self.evaluation else "no", s.eval_steps or s.save_steps),
        }[what]
        return Cadence.of(strategy, every, self.feed.steps_per_epoch, self.total_steps)

    def _epoch(self, state: TrainState) -> float:
        return round(self.feed.epoch(state.step), 6)

    def _position(self, state: TrainState) -> dict[str, Any]:
        return {
            "epoch": self._epoch(state),
            "global_step/max_steps": f"{state.step}/{self.total_steps}",
            "percentage": f"{100 * state.step / self.total_steps:.2f}%",
        }

    def _log_row(self, state: TrainState, info: StepInfo, clock: "Clock") -> dict[str, Any]:
        row = {
            **loss_and_metrics(state.window),
            "grad_norm": info.grad_norm if info.applied else None,
            "learning_rate": info.learning_rate,
        }
        if state.skipped_steps:
            row["skipped_steps"] = state.skipped_steps
        state.window = Sums()
        return {
            **row,
            **self._position(state),
            **self.feed.progress(),
            "elapsed_time": format_seconds(clock.elapsed()),
            "remaining_time": format_seconds(clock.remaining(state.step, self.total_steps)),
            "memory(GiB)": round(peak_memory_gib(), 2),
            "train_speed(iter/s)": round(clock.steps_per_second(state.step), 6),
            "tokens/s": round(clock.tokens_per_second(state.tokens), 1),
        }

    def _evaluate(self, state: TrainState) -> float:
        """Measures and tells the callbacks; the metric that names the best checkpoint."""
        assert self.evaluation is not None
        rest()  # how long it takes depends on its rows
        started = time.perf_counter()
        found = self.evaluation.measure(state)
        seconds = time.perf_counter() - started
        metrics = {f"eval_{k}": v for k, v in loss_and_metrics(found.sums).items()}
        speed = {
            "eval_runtime": round(seconds, 4),
            "eval_samples_per_second": round(found.rows / seconds, 3),
            "eval_steps_per_second": round(found.steps / seconds, 3),
        }
        row = {**metrics, **speed, **self._position(state)}
        self._tell("on_eval", EvalEvent(state.step, row, found.samples))
        return metrics[self.schedule.best_metric]

    def _summary(self, state: TrainState, clock: "Clock") -> dict[str, Any]:
        seconds = clock.elapsed()
        samples = self.feed.rows_until(state.step)

        def path(step: int | None) -> str | None:
            return None if step is None else str(self.run_directory / f"checkpoint-{step}")

        return {
            "train_loss": loss_and_metrics(state.whole)["loss"],
            "train_runtime": round(seconds, 2),
            "train_steps_per_second": round(state.step / seconds, 4) if seconds else 0.0,
            "train_samples_per_second": round(samples / seconds, 3) if seconds else 0.0,
            "train_dataset": self.feed.describe(),
            "val_dataset": self.evaluation.describe() if self.evaluation else None,
            "last_model_checkpoint": path(state.last_saved_step),
            "best_model_checkpoint": path(state.best_step),
            "best_metric": state.best_metric,
            "global_step": state.step,
            "memory": round(peak_memory_gib(), 2),
        }


class Clock:
    """Training time across resumes, and rates of this process alone."""

    def __init__(self, state: TrainState) -> None:
        self.elapsed_before = state.elapsed_seconds
        self.first_step = state.step
        self.started = time.perf_counter()
        self.row_tokens = state.tokens
        self.row_seconds = 0.0

    def elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.started

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around the part of a step that is training."""
        started = time.perf_counter()
        yield
        self.row_seconds += time.perf_counter() - started

    def steps_per_second(self, step: int) -> float:
        return (step - self.first_step) / max(time.perf_counter() - self.started, 1e-9)

    def remaining(self, step: int, total: int) -> float:
        return (total - step) / max(self.steps_per_second(step), 1e-9)

    def tokens_per_second(self, tokens: int) -> float:
        """Of the steps since the log row before this one; evaluation and saving do not count."""
        rate = (tokens - self.row_tokens) / max(self.row_seconds, 1e-9)
        self.row_tokens, self.row_seconds = tokens, 0.0
        return rate


def peak_memory_gib() -> float:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
