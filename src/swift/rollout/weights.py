"""Weights on their way to another process of this host: files of bounded size, in memory where there is room.

Not here: where they come from (`Engine.weights`), who is told of the files (vllm_client.py).
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from swift.engines.slices import write_tensors

SHARED_MEMORY = Path("/dev/shm")
BUCKET_BYTES = 512 * 2**20


def roots() -> list[Path]:
    """Where such files may be, the best first."""
    return [*([SHARED_MEMORY] if SHARED_MEMORY.is_dir() else []), Path(tempfile.gettempdir())]


def roomy(folders: Sequence[Path], size: int) -> Path:
    """The first folder that has room for two files of `size` bytes; else the last one, which takes all."""
    return next((f for f in folders[:-1] if shutil.disk_usage(f).free > 2 * size), folders[-1])


@contextmanager
def folder_for_weights() -> Iterator[list[Path]]:
    """Directories that any process of this user on this host can read, the best first; gone afterwards."""
    folders = [Path(tempfile.mkdtemp(prefix="swift-weights-", dir=root)) for root in roots()]
    try:
        yield folders
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def write_buckets(
    weights: Iterable[tuple[str, Tensor]], folders: list[Path], *, limit: int = BUCKET_BYTES
) -> list[Path]:
    """Safetensors files of about `limit` bytes, in the order of the weights.

    Each goes where it is `roomy`. Raises OSError where the last folder is full.
    """
    files: list[Path] = []
    bucket: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal bucket, size
        if bucket:
            path = roomy(folders, size) / f"{len(files):05d}.safetensors"
            files.append(write_tensors(path, bucket, {"format": "pt"}))
        bucket, size = {}, 0

    for name, tensor in weights:
        # A copy: what the iterator gives is good until its next step only.
        bucket[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        size += tensor.nbytes
        if size >= limit:
            flush()
    flush()
    return files
