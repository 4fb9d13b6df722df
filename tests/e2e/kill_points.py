"""Hooks for `workers.run`: what happens to a run from outside, at one chosen point of it.

Each is called in a forked process before the command line, and changes nothing but the moment of a signal, a
limit of the operating system, or the pace of a thread.
"""

import builtins
import io
import os
import resource
import signal
import threading
from pathlib import Path

from swift.engines import slices
from swift.train import saving
from swift.train.loop import Loop
from swift.utils import files

CALLS = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
         (os, "symlink"), (io, "open"), (builtins, "open"), (slices, "write_tensors"),
         (files, "file_sha256"), (Loop, "_train_step"))  # fmt: skip


def kill_at(rank: int, event: int, counted: str, victim: int = 0, saved: str | None = None) -> None:
    """SIGKILL at the event-th call of CALLS since training began, before it or after it; 0 = never.

    With `saved`, a run's directory, calls count only once a checkpoint of its is whole. The number of calls
    is left in the file `counted` when training ends.
    """
    if rank != victim:
        return
    count = [0]
    lock = threading.Lock()

    def tick() -> None:
        with lock:
            if saved and not count[0] and not any(Path(saved).glob("checkpoint-*")):
                return
            count[0] += 1
            if count[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            tick()
            result = original(*args, **kwargs)
            tick()
            return result

        setattr(owner, name, call)

    train = Loop.run

    def run(self, state):
        for owner, name in CALLS:
            watch(owner, name)
        train(self, state)
        total = count[0]
        Path(counted).write_text(str(total))

    Loop.run = run


def after_step(step: int, action) -> None:
    """Calls `action` with the loop when the step is done and before anyone looks at flags."""
    train_step = Loop._train_step

    def run_step(self, state, clock):
        train_step(self, state, clock)
        if state.step == step:
            action(self)

    Loop._train_step = run_step


def signal_at(rank: int, step: int, name: str, victim: int = 0) -> None:
    """A signal to one rank after that step."""
    if rank == victim:
        after_step(step, lambda _: os.kill(os.getpid(), getattr(signal, name)))


def interrupt_while_saving(rank: int, step: int) -> None:
    """Ctrl-C after a step whose checkpoint is still being written; the writer waits for it."""
    pressed, complete, settle = threading.Event(), saving.Saver._complete, saving.Saver.settle

    def wait_and_complete(self, flight, snapshot):
        if flight.step == step:
            pressed.wait()
        complete(self, flight, snapshot)

    def release_and_settle(self):
        assert self.flight.is_alive
        threading.Timer(0.2, pressed.set).start()
        settle(self)

    saving.Saver._complete, saving.Saver.settle = wait_and_complete, release_and_settle
    signal_at(rank, step, "SIGINT")


def limit_files(rank: int, step: int, limit_bytes: int, victim: int = 0) -> None:
    """From that step on, once nothing is being saved, the system refuses to write more into one file."""

    def limit(loop: Loop) -> None:
        loop.saver.flight.thread.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))

    if rank == victim:
        after_step(step, limit)
