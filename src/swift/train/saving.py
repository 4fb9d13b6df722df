"""Checkpoints: when, where, whole or not at all, and which ones stay.

A checkpoint is written under a temporary name, described by a manifest, synced, then renamed: a directory
called `checkpoint-N` is complete.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from transformers import PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.engines.protocol import Engine, Snapshot
from swift.engines.ranks import Ranks
from swift.models.directory import list_checkpoints, read_json
from swift.train.state import TrainState
from swift.train.stopping import FAILED
from swift.utils.files import (
    describe_files,
    find_damage,
    format_bytes,
    sync_directory,
    write_json,
    write_manifest,
    write_text,
)
from swift.utils.log import say, warn

STATE, ARGS = "trainer_state.json", "args.json"
# What a disk may answer at any time; other errors are our own and are shown as they are.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE)
POLL_SECONDS = 0.02


@dataclass
class Flight:
    """One checkpoint on its way to the disk."""

    step: int
    temporary: Path
    final: Path
    best_step: int | None
    content: dict[str, Any]  # of trainer_state.json
    thread: Thread | None = None
    error: Exception | None = None
    cancelled: Event = field(default_factory=Event)

    @property
    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


@dataclass
class Saver:
    """Writes the checkpoints of one run beside its training, one at a time.

    Training waits while an engine copies what it will write, and for the checkpoint before where that is not
    down yet. Ranks write into one directory. Those after the first leave a list of their files there in the
    end, which rank 0 waits for: threads take no part in exchanges between ranks.
    """

    run_directory: Path
    tokenizer: PreTrainedTokenizerBase
    args: dict[str, Any]
    data: dict[str, Any]  # fingerprint and sizes that a resumed run must match
    _: KW_ONLY
    only_model: bool
    total_limit: int | None
    symlinks: bool
    ranks: Ranks
    iterations: bool = False  # the run directory also names checkpoints as Megatron's tools look for them
    flight: Flight | None = None
    whole: list[Path] = field(default_factory=list)  # written, and not yet asked for by `take_whole`

    def save(self, engine: Engine, state: TrainState, metric: float | None, lower_is_better: bool) -> None:
        """Starts to write checkpoint-<step>. Called by every rank; raises what became of the one before."""
        self.wait()
        if metric is not None and is_better(metric, state.best_metric, lower_is_better):
            state.best_metric, state.best_step = metric, state.step
        state.last_saved_step = state.step
        flight = self.flight = Flight(
            state.step,
            self.run_directory / f".checkpoint-{state.step}.tmp",
            self.run_directory / f"checkpoint-{state.step}",
            state.best_step,
            {"state": state.to_dict(), "data": self.data, "resumable": not self.only_model},
        )
        if self.ranks.is_main:
            shutil.rmtree(flight.temporary, ignore_errors=True)
            self._try(flight, flight.temporary.mkdir)
        self.ranks.collect(None)
        self.raise_failure()
        snapshot = engine.save(flight.temporary, resumable=not self.only_model)
        self._check_space(flight, sum(self.ranks.collect(snapshot.bytes)))
        work = lambda: self._write(flight, snapshot)  # noqa: E731
        flight.thread = Thread(target=self._try, args=(flight, work), name="checkpoint", daemon=True)
        flight.thread.start()

    def wait(self) -> None:
        """Returns when no rank writes any more. Called by every rank; raises what went wrong on any."""
        while any(self.ranks.collect(self.flight is not None and self.flight.is_alive)):
            assert self.flight and self.flight.thread
            if self.ranks.flagged() & FAILED:
                self.flight.cancelled.set()
            self.flight.thread.join(POLL_SECONDS)
        self.raise_failure()

    def settle(self) -> None:
        """Before leaving early: what this rank is writing is finished, what is partial removed."""
        if self.flight and self.flight.thread and self.flight.is_alive:
            say(f"finishing {self.flight.final.name}; Ctrl-C again quits at once")
            self.flight.thread.join()
        for name in remove_partial(self.run_directory) if self.ranks.is_main else []:
            say(f"removed {name}: it was half-written")

    def take_whole(self) -> list[Path]:
        """Checkpoints that have become whole since the last call; on rank 0."""
        taken, self.whole = self.whole, []
        return taken

    def raise_failure(self) -> None:
        """Raises where a rank could not write. Called by every rank, after an exchange."""
        if not self.ranks.flagged() & FAILED:
            return
        flight = self.flight
        assert flight
        flight.cancelled.set()
        if flight.thread:
            flight.thread.join()
        error = flight.error
        reasons = [r for r in self.ranks.collect(None if error is None else disk_reason(error)) if r]
        if self.ranks.is_main:
            shutil.rmtree(flight.temporary, ignore_errors=True)
        if not reasons:
            raise RuntimeError(f"{flight.final.name} could not be written") from error
        free = f"{format_bytes(shutil.disk_usage(self.run_directory).free)} are free"
        raise self._refuse(flight, f"{reasons[0]} ({free}); {flight.temporary.name} was removed")

    def _check_space(self, flight: Flight, size: int) -> None:
        """Refuses a checkpoint of `size` bytes that cannot fit, before a byte of it is written."""
        free = self.ranks.share(shutil.disk_usage(self.run_directory).free)
        if size > free:
            if self.ranks.is_main:
                shutil.rmtree(flight.temporary, ignore_errors=True)
            raise self._refuse(flight, f"it needs {format_bytes(size)}, and {format_bytes(free)} are free")

    def _refuse(self, flight: Flight, reason: str) -> ConfigError:
        others = [path.name for step, path in list_checkpoints(self.run_directory)]
        last = f"the last whole one is {others[-1]}" if others else "there is no whole one before it"
        return ConfigError(
            f"{flight.final.name} cannot be written to {self.run_directory}: {reason}; {last}; "
            "training was stopped",
            hint=f"make room, then go on with --resume_from_checkpoint {self.run_directory}"
            if others
            else "make room, or name another --output_dir",
        )

    def _try(self, flight: Flight, work: Callable[[], None]) -> None:
        """Any error stops all ranks after the step they are in."""
        try:
            work()
        except Exception as error:
            flight.error = error
            self.ranks.flag(FAILED)

    def _write(self, flight: Flight, snapshot: Snapshot) -> None:
        """In a thread of every rank."""
        files = snapshot.write()
        if self.ranks.is_main:
            self._complete(flight, snapshot)
        else:
            done = flight.temporary / f".done-{self.ranks.rank}"
            write_json(done, describe_files(flight.temporary, files))

    def _complete(self, flight: Flight, snapshot: Snapshot) -> None:
        """Adds what is ours to the engine's files and gives the directory its name."""
        self.tokenizer.save_pretrained(flight.temporary)
        write_json(flight.temporary / ARGS, self.args)
        write_json(flight.temporary / STATE, flight.content)
        known: dict[str, Any] = {}
        for rank in range(1, self.ranks.world):
            done = flight.temporary / f".done-{rank}"
            while not done.exists():
                if flight.cancelled.wait(POLL_SECONDS):
                    return
            known |= read_json(done)
            done.unlink()
        if snapshot.finish:
            snapshot.finish()
        write_manifest(flight.temporary, known)
        if flight.final.exists():  # a resumed run reached this step again
            self._remove(flight.final, replaced_by=flight.temporary)
        else:
            flight.temporary.rename(flight.final)
        sync_directory(self.run_directory)
        self.tidy(flight.best_step, flight.step)
        self.whole.append(flight.final)

    def _remove(self, path: Path, replaced_by: Path | None = None) -> None:
        """A directory called checkpoint-N is whole, so it loses its name before its files."""
        hidden = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        if replaced_by:
            replaced_by.rename(path)
        shutil.rmtree(hidden)

    def tidy(self, best_step: int | None, last_step: int | None) -> None:
        """Links to the best and the last one, and no more of the others than the limit says. On rank 0.

        A run that goes on does this too: it may have been killed between a checkpoint and this.
        """
        for name, step in (("last", last_step), ("best", best_step)):
            if self.symlinks and (self.run_directory / f"checkpoint-{step}").exists():
                link(self.run_directory / name, f"checkpoint-{step}")
        if self.total_limit is not None:
            checkpoints = list_checkpoints(self.run_directory)
            spare = [path for step, path in checkpoints if step not in (best_step, last_step)]
            for path in spare[: max(len(checkpoints) - self.total_limit, 0)]:
                self._remove(path)
        if self.iterations:
            list_iterations(self.run_directory)


def link(path: Path, target: str) -> None:
    """Makes `path` a link to `target` beside it, in one move."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)


def list_iterations(run_directory: Path) -> None:
    """Links `iter_0000100` to the part of each checkpoint that Megatron reads, and names the last one."""
    for path in run_directory.glob("iter_*"):
        if path.is_symlink() and not path.exists():
            path.unlink()
    last = None
    for step, checkpoint in list_checkpoints(run_directory):
        name = f"iter_{step:07d}"
        if (checkpoint / name).is_dir():
            link(run_directory / name, f"{checkpoint.name}/{name}")
            last = step
    if last is not None:
        write_text(run_directory / "latest_checkpointed_iteration.txt", f"{last}\n")


def disk_reason(error: Exception) -> str | None:
    """What the operating system said, where it did. Libraries in Rust put its number into their errors."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    return os.strerror(number) if number in DISK_ERRORS else None


def is_better(value: float, best: float | None, lower: bool) -> bool:
    return best is None or (value < best if lower else value > best)


def remove_partial(run_directory: Path) -> list[str]:
    """Deletes what a killed process left half-written; returns the names."""
    partial = sorted(run_directory.glob(".checkpoint-*.tmp"))
    for path in partial:
        shutil.rmtree(path, ignore_errors=True)
    return [p.name for p in partial]


def find_checkpoint(path: Path) -> Path:
    """A whole, resumable checkpoint: `path` itself, or the last whole one of a run directory."""
    if not path.is_dir():
        raise ConfigError(
            f"--resume_from_checkpoint {path} is not a directory", hint="name a checkpoint-N directory"
        )
    path = path.resolve()
    if (path / STATE).exists() or path.name.startswith("checkpoint-"):
        damage = find_damage(path)
        if damage:
            others = (p for _, p in reversed(list_checkpoints(path.parent)) if p != path)
            whole = next((p for p in others if not find_damage(p)), None)
            hint = (
                f"resume from {whole}" if whole else "no other checkpoint of this run is whole: start again"
            )
            raise ConfigError(f"--resume_from_checkpoint {path} is damaged: {damage}", hint=hint)
    else:
        path = find_whole(path)
    if not read_json(path / STATE)["resumable"]:
        raise ConfigError(
            f"--resume_from_checkpoint {path} has no optimizer state (saved with --save_only_model true)",
            hint="train from its weights instead",
        )
    return path


def find_whole(run_directory: Path) -> Path:
    """The last whole checkpoint of a run. Says which later ones are not."""
    for _, path in reversed(list_checkpoints(run_directory)):
        damage = find_damage(path)
        if damage is None:
            return path
        warn(f"{path} is damaged: {damage}; looking for the one before it")
    raise ConfigError(
        f"--resume_from_checkpoint {run_directory} holds no whole checkpoint",
        hint="name a run or checkpoint directory",
    )
