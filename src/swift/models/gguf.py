"""Reading the GGUF file of the built-in model: its metadata and its tensors as float32 arrays.

Owns: as much of the format as that one file uses, whose sha256 is checked before it is read (builtin.py):
version 3, little-endian, the block types F32, Q8_0 and Q4_1.
Not here: what the tensors mean to a model (gguf_convert.py).
Source: ggml-org/ggml, docs/gguf.md (container) and src/ggml-common.h (blocks).
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF\3\0\0\0"  # with the version
ALIGNMENT = 32  # bytes
STRING, ARRAY = 8, 9  # metadata value types that are not plain numbers
# Metadata value type -> numpy dtype of its numbers.
SMALL_NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")
NUMBERS = dict(enumerate(SMALL_NUMBERS)) | {10: "<u8", 11: "<i8", 12: "<f8"}
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCKS = {F32: (1, 4), Q4_1: (32, 20), Q8_0: (32, 34)}  # block type -> values and bytes of a block
BLOCKS_AT_ONCE = 1 << 16  # decoded together, so that the temporaries of a large tensor stay small


def decode(kind: int, blocks: np.ndarray) -> np.ndarray:
    """[N, bytes] uint8 -> [N, values] float32."""
    if kind == F32:
        return blocks.view("<f4")
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == Q8_0:  # scale f16, 32 signed bytes
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    # Scale f16, minimum f16, 16 bytes: the low halves are values 0-15, the high halves values 16-31.
    minimum = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return scale * nibbles + minimum


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]  # numpy order: the last dimension is contiguous
    kind: int
    offset: int  # bytes after the header


class GgufFile:
    """A GGUF file mapped into memory; nothing but the header is read until `read` asks for a tensor."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as handle:
            self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        assert self._bytes[: len(MAGIC)] == MAGIC, f"{path} is not GGUF, version 3"
        self._position = len(MAGIC)
        num_tensors, num_values = self._numbers("<QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._text()
            self.metadata[key] = self._value(*self._numbers("<I"))
        self.tensors: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            name = self._text()
            dims = self._numbers("<{}Q".format(*self._numbers("<I")))
            self.tensors[name] = TensorInfo(dims[::-1], *self._numbers("<IQ"))
        self._data_start = -(-self._position // ALIGNMENT) * ALIGNMENT  # rounded up

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, in its own memory."""
        info = self.tensors[name]
        num_values, num_bytes = BLOCKS[info.kind]
        size = math.prod(info.shape) // num_values * num_bytes
        blocks = np.frombuffer(self._bytes, np.uint8, size, self._data_start + info.offset)
        blocks = blocks.reshape(-1, num_bytes)
        values = np.empty((len(blocks), num_values), np.float32)
        for first in range(0, len(blocks), BLOCKS_AT_ONCE):
            values[first : first + BLOCKS_AT_ONCE] = decode(info.kind, blocks[first : first + BLOCKS_AT_ONCE])
        return values.reshape(info.shape)

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._bytes, self._position)
        self._position += struct.calcsize(layout)
        return values

    def _text(self) -> str:
        (size,) = self._numbers("<Q")
        self._position += size
        return self._bytes[self._position - size : self._position].decode("utf-8", "surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            element, count = self._numbers("<IQ")
            return [self._value(element) for _ in range(count)]
        number = np.frombuffer(self._bytes, NUMBERS[kind], 1, self._position)
        self._position += number.nbytes
        return number[0].item()
