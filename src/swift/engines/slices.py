"""Tensors in safetensors files, whole or as the slices that each process holds.

Owns: copying to the host, writing, and putting slices together again for any number of processes.
Names are the only key: a file says of each of its tensors which part of which whole it is, and a reader takes
what it needs of all files. They are written here and not by the safetensors package, because that holds the
interpreter's lock until the last byte is down, and training goes on meanwhile.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, zeros

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
WHOLES = "wholes"  # in the header's metadata: name -> [shape of the whole, offset of this part]


@dataclass(frozen=True)
class Part:
    """A host copy of the slice that begins at `offset` of a tensor of `shape`."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU that later training steps do not change. From a GPU it is complete after `settle`."""
    local = tensor.detach()
    host = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    return host.copy_(local, non_blocking=True)


def settle() -> None:
    """Waits for the copies that `to_host` has under way."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_parts(tensors: Mapping[str, Tensor], *, rank: int, world: int) -> dict[str, Part]:
    """What this process has to write: its slices, and of the tensors that all of them hold, its share."""
    parts = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        if isinstance(tensor, DTensor):
            local, (chunk,) = tensor.to_local(), tensor.__create_chunk_list__()
            if local.numel():
                parts[name] = Part(to_host(local), tuple(tensor.shape), tuple(chunk.offsets))
        elif i % world == rank:
            parts[name] = Part(to_host(tensor), tuple(tensor.shape), (0,) * tensor.ndim)
    return parts


def write_parts(path: Path, parts: Mapping[str, Part]) -> Path:
    """One process' file of slices; its path."""
    wholes = {name: [part.shape, part.offset] for name, part in parts.items()}
    return write_tensors(
        path, {name: part.tensor for name, part in parts.items()}, {WHOLES: json.dumps(wholes)}
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """A safetensors file of CPU tensors; its path. Wide dtypes come first, so that each tensor is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            if tensor.numel():
                handle.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return path


class Reader:
    """Whole tensors, or slices of them, from the files that `write_parts` left in any number of processes."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files = [safe_open(path, framework="pt") for path in sorted(paths)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sources: dict[str, list[tuple[int, tuple[int, ...]]]] = {}  # (file, offset) of every part
        for i, file in enumerate(self.files):
            for name, (shape, offset) in json.loads(file.metadata()[WHOLES]).items():
                self.shapes[name] = tuple(shape)
                self.sources.setdefault(name, []).append((i, tuple(offset)))

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """On the CPU as one tensor; where `like` is sliced over processes, sliced as it is, on its device."""
        shape = self.shapes[name]
        dtype = BY_NAME[self.files[self.sources[name][0][0]].get_slice(name).get_dtype()]
        if not isinstance(like, DTensor) or not shape:
            whole = torch.empty(shape, dtype=dtype)
            self._fill(whole, name, (0,) * len(shape))
            return whole
        sliced = zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
        host = torch.empty(sliced.to_local().shape, dtype=dtype)
        (chunk,) = sliced.__create_chunk_list__()
        self._fill(host, name, tuple(chunk.offsets))
        sliced.to_local().copy_(host)
        return sliced

    def _fill(self, target: Tensor, name: str, offset: tuple[int, ...]) -> None:
        """`target` begins at `offset` of the whole; every part gives what the two have in common."""
        filled = 0
        for file, start in self.sources[name]:
            part = self.files[file].get_slice(name)
            lows = [max(a, b) for a, b in zip(offset, start, strict=True)]
            ends = zip(offset, target.shape, start, part.get_shape(), strict=True)
            highs = [min(a + n, b + m) for a, n, b, m in ends]
            if any(low >= high for low, high in zip(lows, highs, strict=True)):
                continue
            there = tuple(slice(x - b, y - b) for x, y, b in zip(lows, highs, start, strict=True))
            here = tuple(slice(x - a, y - a) for x, y, a in zip(lows, highs, offset, strict=True))
            values = part[there] if there else self.files[file].get_tensor(name)
            target[here] = values
            filled += values.numel()
        assert filled == target.numel(), f"{name}: the files hold {filled} of {target.numel()} numbers"
