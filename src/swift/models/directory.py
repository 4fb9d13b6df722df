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
    missing = missing_model_file(path)
    if missing is None:
        return
    hint = hint_checkpoints(path)
    if (path / ADAPTER_CONFIG).is_file():
        hint = f"it holds adapters: pass --adapters {path}"
    raise ConfigError(f"--model {path} has no {missing}", hint=hint)


def check_adapter_directory(path: Path) -> None:
    """Raises ConfigError unless `path` holds adapters with their config."""
    missing = missing_adapter_file(path)
    if missing is None:
        return
    hint = hint_checkpoints(path)
    if missing_model_file(path) is None:
        hint = f"it holds a whole model: pass --model {path}"
    raise ConfigError(f"--adapters {path} has no {missing}", hint=hint)


def hint_checkpoints(path: Path) -> str | None:
    """Names the checkpoint inside a run directory that was probably meant."""
    found = [p for p in path.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    if not found:
        return None
    return f"a checkpoint inside it: {max(found, key=lambda p: int(p.name.rpartition('-')[2]))}"


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
