"""Checkpoints: when, where, whole or not at all, and which ones stay.

A checkpoint is written under a temporary name, described by a manifest, synced, then renamed: a directory
called `checkpoint-N` is complete.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.engines.protocol import Engine
from swift.engines.ranks import Ranks
from swift.train.state import TrainState
from swift.utils.files import file_sha256, sync_directory, write_json

MANIFEST, STATE, ARGS = "manifest.json", "trainer_state.json", "args.json"
NAME = re.compile(r"checkpoint-(\d+)")


def write_manifest(directory: Path) -> None:
    """Sizes and hashes of every file, written last; the files are on disk before it is.

    Everyone may read the files: safetensors makes its own readable for the owner alone.
    """
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        path.chmod(0o644)
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        files[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(directory / MANIFEST, {"files": files})
    sync_directory(directory)


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is as it was written."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}"
    try:
        files: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if file_sha256(path) != expected["sha256"]:
            return f"the contents of {name} have changed"
    return None


def list_checkpoints(run_directory: Path) -> list[tuple[int, Path]]:
    """(step, path) in order of step."""
    found = [
        (int(m[1]), p)
        for p in run_directory.glob("checkpoint-*")
        if (m := NAME.fullmatch(p.name)) and p.is_dir()
    ]
    return sorted(found)


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of one run."""

    run_directory: Path
    tokenizer: PreTrainedTokenizerBase
    args: dict[str, Any]
    data: dict[str, Any]  # fingerprint and sizes that a resumed run must match
    only_model: bool
    total_limit: int | None
    symlinks: bool
    ranks: Ranks

    def save(self, engine: Engine, state: TrainState, metric: float | None, lower_is_better: bool) -> Path:
        """Writes checkpoint-<step>, updates best and last, deletes what the limit no longer keeps.

        Called by every rank: they write into one directory, and rank 0 does the rest.
        """
        if metric is not None and is_better(metric, state.best_metric, lower_is_better):
            state.best_metric, state.best_step = metric, state.step
        state.last_saved_step = state.step
        final = self.run_directory / f"checkpoint-{state.step}"
        temporary = self.run_directory / f".checkpoint-{state.step}.tmp"
        if self.ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.ranks.barrier()
        engine.save(temporary, resumable=not self.only_model)
        self.ranks.barrier()
        if self.ranks.is_main:
            self._complete(temporary, final, state)
        self.ranks.barrier()
        return final

    def _complete(self, temporary: Path, final: Path, state: TrainState) -> None:
        """Adds what is ours to the engine's files and gives the directory its name."""
        self.tokenizer.save_pretrained(temporary)
        write_json(temporary / ARGS, self.args)
        write_json(temporary / STATE, {"state": state.to_dict(), "data": self.data})
        write_manifest(temporary)
        replaced = self.run_directory / f".checkpoint-{state.step}.old.tmp"
        if final.exists():  # a resumed run reached this step again
            final.rename(replaced)
        temporary.rename(final)
        sync_directory(self.run_directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._link(state)
        self._rotate(state)

    def _link(self, state: TrainState) -> None:
        if not self.symlinks:
            return
        for name, step in (("last", state.last_saved_step), ("best", state.best_step)):
            if step is None:
                continue
            temporary = self.run_directory / f".{name}.tmp"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(f"checkpoint-{step}")
            temporary.replace(self.run_directory / name)

    def _rotate(self, state: TrainState) -> None:
        if self.total_limit is None:
            return
        checkpoints = list_checkpoints(self.run_directory)
        spare = [p for step, p in checkpoints if step not in (state.best_step, state.last_saved_step)]
        for path in spare[: max(len(checkpoints) - self.total_limit, 0)]:
            shutil.rmtree(path)


def is_better(value: float, best: float | None, lower: bool) -> bool:
    return best is None or (value < best if lower else value > best)


def remove_partial(run_directory: Path) -> list[str]:
    """Deletes what a killed process left half-written; returns the names."""
    partial = sorted(run_directory.glob(".checkpoint-*.tmp"))
    for path in partial:
        shutil.rmtree(path)
    return [p.name for p in partial]


def find_checkpoint(path: Path) -> Path:
    """A whole, resumable checkpoint: `path` itself, or the last whole one of a run directory."""
    if not path.is_dir():
        raise ConfigError(
            f"--resume_from_checkpoint {path} is not a directory", hint="name a checkpoint-N directory"
        )
    path = path.resolve()
    if (path / STATE).exists() or NAME.fullmatch(path.name):
        damage = find_damage(path)
        if damage:
            whole = [str(p) for _, p in list_checkpoints(path.parent) if p != path and not find_damage(p)]
            hint = (
                f"resume from {whole[-1]}"
                if whole
                else "no other checkpoint of this run is whole: start again"
            )
            raise ConfigError(f"--resume_from_checkpoint {path} is damaged: {damage}", hint=hint)
    else:
        whole_paths = [p for _, p in list_checkpoints(path) if not find_damage(p)]
        if not whole_paths:
            raise ConfigError(
                f"--resume_from_checkpoint {path} holds no whole checkpoint",
                hint="name a run or checkpoint directory",
            )
        path = whole_paths[-1]
    if not (path / "optimizer.pt").exists():
        raise ConfigError(
            f"--resume_from_checkpoint {path} has no optimizer state (saved with --save_only_model true)",
            hint="train from its weights instead",
        )
    return path
