"""Files that both engines write: names of weights, adapters as PEFT has them, random states.

Not here: what goes into them (checkpoint.py of each engine), tensors cut over processes (slices.py).
"""

import io
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor

from swift.engines.slices import write_tensors
from swift.models.directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from swift.utils.files import write_json

SCHEDULER, RANDOM = "scheduler.pt", "rng_state.pth"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30  # a larger model is written as several files, each by another process

Writer = Callable[[Path], list[Path]]  # into a directory; what it wrote


def keep_bytes(name: str, value: Any) -> Writer:
    """Writer of a small file whose content is fixed now."""
    buffer = io.BytesIO()
    torch.save(value, buffer)

    def write(into: Path) -> list[Path]:
        (into / name).write_bytes(buffer.getvalue())
        return [into / name]

    return write


def adapter_writer(config: PeftConfig, tensors: dict[str, Tensor]) -> Writer:
    """Writer of adapters under the names of PEFT. `config` is changed: to one that is not trained on."""
    config.inference_mode = True

    def write(into: Path) -> list[Path]:
        config.save_pretrained(str(into))
        return [into / ADAPTER_CONFIG, write_tensors(into / ADAPTER_WEIGHTS[0], tensors, {"format": "pt"})]

    return write


def split_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in the order of the model, cut between layers so that files have about `limit` bytes.

    A layer stays together: formats on disk may cut one tensor of a layer into several, or join them.
    """
    shards: list[list[str]] = [[]]
    size, layer = 0, ""
    for name, num_bytes in sizes.items():
        at = next((name[: name.index(part)] + part for part in name.split(".") if part.isdecimal()), name)
        if at != layer and size >= limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, layer = size + num_bytes, at
    return shards


def cut_into_files(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """The tensors of each file: of model.safetensors, or of model-00001-of-00002.safetensors ..."""
    shards = split_shards(sizes, limit)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    count = len(shards)
    return {f"{Path(WEIGHTS).stem}-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def write_index(into: Path, files: Mapping[str, Iterable[str]], total: int) -> None:
    """Where the tensors of a model of `total` bytes are; one file needs no index."""
    if len(files) > 1:
        places = {tensor: name for name, tensors in files.items() for tensor in tensors}
        write_json(into / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def random_file(rank: int) -> str:
    """Rank 0's has the name that single processes use."""
    return RANDOM if rank == 0 else f"{Path(RANDOM).stem}_{rank}.pth"


def random_states() -> dict[str, Any]:
    """Every random state that training reads, of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def load_random(path: Path, rank: int) -> dict[str, Any] | None:
    """The inverse of `random_states`; what was saved. None: the saving job had no such rank, seeds stay."""
    if not (path / random_file(rank)).exists():
        return None
    # The states hold numpy arrays and tuples; they are ours, and their hash was checked before.
    states: dict[str, Any] = torch.load(path / random_file(rank), weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    return states
