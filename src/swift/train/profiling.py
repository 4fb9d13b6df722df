"""--profile_steps: what the first process does in a few steps, as files for a browser."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from swift.plugins.callbacks import Callback, EndEvent, StartEvent, StepEvent
from swift.utils.log import say, warn

MEMORY_EVENTS = 200_000  # allocations that a snapshot goes back


class Profiler(Callback):
    """Leaves steps-FIRST-LAST.json.gz (a Chrome trace, for ui.perfetto.dev), and on a GPU memory.pickle

    (every allocation in these steps, for pytorch.org/memory_viz).
    """

    def __init__(self, directory: Path, steps: range) -> None:
        self.directory, self.steps = directory, steps
        self.profile: profile | None = None

    def on_start(self, event: StartEvent) -> None:
        if event.total_steps < self.steps[-1] or event.step >= self.steps[0]:
            warn(
                f"--profile_steps {self.steps[0]}:{self.steps[-1]}: this run does steps {event.step + 1} "
                f"to {event.total_steps}, so nothing is profiled"
            )
        elif event.step == self.steps[0] - 1:
            self._begin()

    def on_step(self, event: StepEvent) -> None:
        if self.profile and event.step == self.steps[-1]:
            self._finish()
        elif self.profile is None and event.step == self.steps[0] - 1:
            self._begin()

    def on_end(self, _: EndEvent) -> None:
        if self.profile:
            self._finish()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self.profile.start()

    def _finish(self) -> None:
        assert self.profile is not None
        self.profile.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        trace = self.directory / f"steps-{self.steps[0]}-{self.steps[-1]}.json.gz"
        self.profile.export_chrome_trace(str(trace))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.directory / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profile = None
        say(f"profile of steps {self.steps[0]} to {self.steps[-1]}: {trace}")
