"""Directories with weights in Megatron's format: which iteration counts, is it whole, which model is it of.

    D/args.json, D/latest_checkpointed_iteration.txt ("100"), D/config.json and the tokenizer
    D/iter_0000100/.metadata, __0_0.distcp, common.pt, ...
    D/manifest.json or D/iter_0000100/manifest.json: sizes of the files, where we have written them

Not here: what the files hold (engines/megatron), HuggingFace directories (directory.py).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError
from swift.models.adapters import load_run_args
from swift.models.directory import ADAPTER_CONFIG, last_checkpoint, missing_model_file, read_json

TRACKER, METADATA, MANIFEST = "latest_checkpointed_iteration.txt", ".metadata", "manifest.json"
ITERATION = re.compile(r"iter_(\d+)")


@dataclass(frozen=True)
class McoreCheckpoint:
    """Weights in Megatron's format, all of whose files are there."""

    directory: Path  # with args.json
    weights: Path  # the iter_ directory in it
    iteration: int
    args: dict[str, Any]

    @property
    def model(self) -> str:
        """The HuggingFace model it was made from, as its args.json or else its own config.json names it."""
        return str(self.args.get("model") or self.directory)

    @property
    def config_directory(self) -> Path | None:
        """Where config.json and the tokenizer are; None where --model has to be asked."""
        return self.directory if (self.directory / "config.json").is_file() else None


def find_mcore(path: Path) -> McoreCheckpoint:
    """The checkpoint in `path`: a converted directory, an iter_ in one, or the last one of a run of megatron.

    Raises ConfigError, in one line, where something is missing.
    """
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise ConfigError(f"--mcore_model {path}: no such directory")
    last = last_checkpoint(path)
    if last and not (path / TRACKER).is_file():
        path = last
    named = ITERATION.fullmatch(path.name)
    directory, weights = (path.parent, path) if named else (path, _tracked(path))
    if (directory / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"--mcore_model {directory} holds adapters alone",
            hint=f"--model MODEL --adapters {directory} trains them on",
        )
    _check_whole(directory, weights)
    args = load_run_args(directory)
    if not args.get("model") and not (directory / "config.json").is_file():
        raise ConfigError(
            f"--mcore_model {directory} has neither args.json nor config.json to say which model it is",
            hint="convert it again: swift export --model MODEL --to_mcore true",
        )
    found = ITERATION.fullmatch(weights.name)
    return McoreCheckpoint(directory, weights, int(found[1]) if found else 0, args)


def find_weights(path: Path) -> McoreCheckpoint | Path:
    """As `find_mcore`, or the HuggingFace directory that was meant: `path` or its last checkpoint."""
    for directory in (path, last_checkpoint(path)):
        if directory and missing_model_file(directory) is None:
            return directory.expanduser().absolute()
    return find_mcore(path)


def _tracked(path: Path) -> Path:
    present = sorted(p.name for p in path.glob("iter_*") if ITERATION.fullmatch(p.name))
    if not (path / TRACKER).is_file():
        runs = sorted(path.glob("v*-*"))
        hint = "a HuggingFace model is given as --model"
        if present:
            hint = f"it was not written to the end; --mcore_model {path / present[-1]} takes that one"
        elif runs:
            hint = f"a run inside it: {runs[-1]}"
        raise ConfigError(f"--mcore_model {path} has no {TRACKER}", hint=hint)
    text = (path / TRACKER).read_text(encoding="utf-8").strip()
    name = f"iter_{int(text):07d}" if text.isdecimal() else text
    if name != "release" and not text.isdecimal():
        raise ConfigError(f"{path / TRACKER} holds {text!r} instead of the number of an iteration")
    if not (path / name).is_dir():
        raise ConfigError(
            f"--mcore_model {path} has no {name}, which its {TRACKER} names",
            hint=f"it has {', '.join(present)}" if present else "convert or copy it again",
        )
    return path / name


def _check_whole(directory: Path, weights: Path) -> None:
    """Raises ConfigError unless the files are there that a manifest lists, in their sizes."""
    again = "convert or copy it again"
    if not (weights / METADATA).is_file():
        raise ConfigError(
            f"--mcore_model {weights} has no {METADATA}: it was not written to the end", hint=again
        )
    manifest = next((p for p in (weights / MANIFEST, directory / MANIFEST) if p.is_file()), None)
    if manifest is None:  # other programs than ours write none; METADATA comes last with them too
        return
    for name, expected in read_json(manifest).get("files", {}).items():
        file = manifest.parent / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes instead of {expected['bytes']}"
            raise ConfigError(f"--mcore_model {weights}: {name} {what}", hint=again)
