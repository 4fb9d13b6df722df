"""Reading a GGUF file: its metadata and its tensors as float32 arrays.

Owns: the container format (versions 2 and 3, little-endian)
and the block types F32, F16, BF16, Q8_0, Q4_0, Q4_1.
Not here: what the tensors mean to a model (gguf_convert.py).
Source: ggml-org/ggml, docs/gguf.md (container) and src/ggml-common.h (blocks).
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes; general.alignment overrides it
STRING, ARRAY = 8, 9  # metadata value types that are not plain numbers
# Metadata value type -> numpy dtype of its numbers.
SMALL_NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")
NUMBERS = dict(enumerate(SMALL_NUMBERS)) | {10: "<u8", 11: "<i8", 12: "<f8"}
ROWS_AT_ONCE = 1 << 16  # blocks decoded together, so that the temporaries of a large tensor stay small


class GgufError(ValueError):
    """The file is not GGUF, is cut short, or uses something that this reader does not know."""


def decode_f32(blocks: np.ndarray) -> np.ndarray:
    """[N, 4] bytes -> [N, 1]."""
    return blocks.view("<f4")


def decode_f16(blocks: np.ndarray) -> np.ndarray:
    """[N, 2] bytes -> [N, 1]."""
    return blocks.view("<f2").astype(np.float32)


def decode_bf16(blocks: np.ndarray) -> np.ndarray:
    """[N, 2] bytes -> [N, 1]; bfloat16 is the upper half of a float32."""
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    """[N, 34] bytes (scale f16, 32 signed bytes) -> [N, 32] = scale * q."""
    return read_f16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    """[N, 18] bytes (scale f16, 16 bytes of nibbles) -> [N, 32] = scale * (q - 8)."""
    return read_f16(blocks, 0) * (read_nibbles(blocks[:, 2:]) - 8)


def decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    """[N, 20] bytes (scale f16, minimum f16, 16 bytes of nibbles) -> [N, 32] = scale * q + minimum."""
    return read_f16(blocks, 0) * read_nibbles(blocks[:, 4:]) + read_f16(blocks, 2)


def read_f16(blocks: np.ndarray, start: int) -> np.ndarray:
    """[N, 1] float32: the half-precision number at byte `start` of every block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def read_nibbles(packed: np.ndarray) -> np.ndarray:
    """[N, 16] bytes -> [N, 32] float32: the low halves are values 0-15, the high halves values 16-31."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a run of `values` numbers is stored in `nbytes` bytes."""

    name: str
    values: int
    nbytes: int
    decode: Callable[[np.ndarray], np.ndarray]  # [N, nbytes] uint8 -> [N, values] float32


# ggml type number -> layout
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, decode_f32),
    1: BlockType("F16", 1, 2, decode_f16),
    2: BlockType("Q4_0", 32, 18, decode_q4_0),
    3: BlockType("Q4_1", 32, 20, decode_q4_1),
    8: BlockType("Q8_0", 32, 34, decode_q8_0),
    30: BlockType("BF16", 1, 2, decode_bf16),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]  # numpy order: the last dimension is contiguous
    block_type: BlockType
    start: int  # first byte in the file


class Cursor:
    """A position in a byte buffer that moves past what it reads."""

    def __init__(self, buffer: Any, position: int = 0) -> None:
        self.buffer = buffer
        self.position = position

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.buffer, self.position)
        self.position += struct.calcsize(layout)
        return values

    def text(self) -> str:
        (size,) = self.numbers("<Q")
        raw = self.buffer[self.position : self.position + size]
        self.position += size
        return raw.decode("utf-8", "surrogateescape")

    def array(self, dtype: str, count: int) -> list[Any]:
        values = np.frombuffer(self.buffer, dtype, count, self.position)
        self.position += values.nbytes
        return values.tolist()

    def value(self, kind: int) -> Any:
        """One metadata value of type number `kind`."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            element, count = self.numbers("<IQ")
            if element in NUMBERS:
                return self.array(NUMBERS[element], count)
            return [self.value(element) for _ in range(count)]
        if kind not in NUMBERS:
            raise GgufError(f"unknown metadata type {kind}")
        return self.array(NUMBERS[kind], 1)[0]


class GgufFile:
    """A GGUF file mapped into memory; nothing but the header is read until `read` asks for a tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as handle:
            self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, self.tensors = read_header(self._bytes)
        except (struct.error, ValueError) as error:
            reason = error if isinstance(error, GgufError) else "the header is cut short"
            raise GgufError(f"{path}: {reason}") from error

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, in its own memory."""
        info = self.tensors[name]
        kind, total = info.block_type, math.prod(info.shape)
        size = total // kind.values * kind.nbytes
        if info.start + size > len(self._bytes):
            raise GgufError(f"{self.path}: the file ends before tensor {name}")
        blocks = np.frombuffer(self._bytes, np.uint8, size, info.start).reshape(-1, kind.nbytes)
        values = np.empty((len(blocks), kind.values), np.float32)
        for first in range(0, len(blocks), ROWS_AT_ONCE):
            values[first : first + ROWS_AT_ONCE] = kind.decode(blocks[first : first + ROWS_AT_ONCE])
        return values.reshape(info.shape)


def read_header(buffer: Any) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata and tensor table of a GGUF file."""
    if buffer[: len(MAGIC)] != MAGIC:
        raise GgufError("not a GGUF file")
    cursor = Cursor(buffer, len(MAGIC))
    (version,) = cursor.numbers("<I")
    if version not in VERSIONS:
        raise GgufError(f"GGUF version {version} is not supported")
    num_tensors, num_values = cursor.numbers("<QQ")
    metadata = {}
    for _ in range(num_values):
        key = cursor.text()
        (kind,) = cursor.numbers("<I")
        metadata[key] = cursor.value(kind)
    entries = []
    for _ in range(num_tensors):
        name = cursor.text()
        (num_dims,) = cursor.numbers("<I")
        dims = cursor.numbers(f"<{num_dims}Q")
        kind, offset = cursor.numbers("<IQ")
        if kind not in BLOCK_TYPES:
            raise GgufError(f"tensor {name} has block type {kind}, which is not supported")
        entries.append((name, tuple(reversed(dims)), BLOCK_TYPES[kind], offset))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    data_start = -(-cursor.position // alignment) * alignment  # rounded up
    return metadata, {name: TensorInfo(shape, kind, data_start + at) for name, shape, kind, at in entries}
