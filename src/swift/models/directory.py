"""What a directory on disk holds: a whole model, adapters, or something that only looks like one.

Owns: the checks before anything is loaded, with the missing file named.
Not here: hubs (hub.py), loading (load.py).
"""

import json
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def weight_files(path: Path) -> list[Path]:
    """Files with a model's own weights, without adapters."""
    files = {file for pattern in WEIGHT_PATTERNS for file in path.glob(pattern)}
    return sorted(file for file in files if not file.name.startswith("adapter_"))


def missing_model_file(path: Path) -> str | None:
    """The first thing that `path` lacks to be a model; None when it is whole."""
    if not (path / "config.json").is_file():
        return "config.json"
    for name in INDEX_FILES:
        if (path / name).is_file():
            shards = sorted(set(read_json(path / name).get("weight_map", {}).values()))
            absent = [shard for shard in shards if not (path / shard).is_file()]
            if absent:
                return f"{absent[0]} ({len(absent)} of {len(shards)} weight files that {name} lists)"
    return None if weight_files(path) else f"weights ({' or '.join(WEIGHT_PATTERNS)})"


def missing_adapter_file(path: Path) -> str | None:
    """The first thing that `path` lacks to be a directory with adapters; None when it is whole."""
    if not (path / ADAPTER_CONFIG).is_file():
        return ADAPTER_CONFIG
    return None if any((path / name).is_file() for name in ADAPTER_WEIGHTS) else ADAPTER_WEIGHTS[0]


def check_model_directory(path: Path) -> None:
    """Raises ConfigError unless `path` holds a config and all weights."""
    other = f"it holds adapters: pass --adapters {path}" if (path / ADAPTER_CONFIG).is_file() else None
    _check("--model", path, missing_model_file(path), other)


def check_adapter_directory(path: Path) -> None:
    """Raises ConfigError unless `path` holds adapters with their config."""
    other = f"it holds a whole model: pass --model {path}" if missing_model_file(path) is None else None
    _check("--adapters", path, missing_adapter_file(path), other)


def _check(flag: str, path: Path, missing: str | None, other: str | None) -> None:
    """`other`: what the directory is instead, or else a run with the checkpoint that was probably meant."""
    if missing is not None:
        last = last_checkpoint(path)
        hint = other or (f"a checkpoint inside it: {last}" if last else None)
        raise ConfigError(f"{flag} {path} has no {missing}", hint=hint)


def list_checkpoints(run_directory: Path) -> list[tuple[int, Path]]:
    """(N, path) of every checkpoint-N of a run, in order of N."""
    found = ((p.name.removeprefix("checkpoint-"), p) for p in run_directory.expanduser().glob("checkpoint-*"))
    return sorted((int(number), p) for number, p in found if number.isdecimal() and p.is_dir())


def last_checkpoint(run_directory: Path) -> Path | None:
    return max(list_checkpoints(run_directory), default=(0, None))[1]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError when it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def describe_weights(path: Path) -> str:
    """Names, sizes and times of the files of a model: another text as soon as one of them is another."""
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
    return "\n".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
