"""Keys and values of the answers in flight, as the decoder sees them, and what their kinds have in common.

Kinds: one slot a row (slots.py), pages that rows take as they grow (pages.py).
Shapes: R = rows in flight, N = flat tokens, M = tokens to store, K = key-value heads, D = head width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from swift.engines.attention import Attending, Heads, Segments
from swift.rollout.prompts import Layout

SHARE, CPU_SHARE = (
    0.8,
    0.6,
)  # of memory, for keys and values: prompts need some for what is computed on the way


class Cache(Protocol):
    """Rows are numbered from 0 without gaps; new ones come at the end."""

    @property
    def is_sized(self) -> bool:
        """Whether it is known what a token takes: not before layers have written."""
        ...

    @property
    def most(self) -> int:
        """Tokens of the longest row that memory holds, as far as that is known."""
        ...

    def join(self, length: int, count: int, longest: int, *, whole: bool) -> int:
        """Makes room for answers to one prompt of `length` tokens; how many rows have joined.

        All or none with `whole`. `longest`: of all rows in flight and the new ones, with their next token.
        """
        ...

    def reading(self, prompts: Layout, counts: Sequence[int], longest: int) -> Attending:
        """For a flat row of prompts that joined since the last one; each is answered `counts` times."""
        ...

    def grow(self, lengths: Sequence[int]) -> int:
        """Makes room for a token of every row, of `lengths` tokens with it; how many rows may go on.

        The others, which are the last ones, are gone.
        """
        ...

    def decoding(self, lengths_R: Tensor, longest: int) -> Attending:
        """For one token a row, behind `lengths_R` that are stored; `longest`: of all, with the new one."""
        ...

    def remove(self, gone: Sequence[int], moves: Sequence[tuple[int, int]], longest: int) -> None:
        """Takes rows out, then moves others, of up to `longest` tokens, from the end into the holes."""
        ...

    def clear(self) -> None:
        """Frees the memory; no row is left."""
        ...


class Buffers:
    """Keys and values of each layer [places, K, width, D], made when it first writes: it knows the shape."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values

    @property
    def is_sized(self) -> bool:
        return bool(self.layers)

    def make(self, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def write(
        self, layer: int, places_M: Tensor, offsets_M: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Puts key and value [M, K, D] at offsets of places; the buffers of the layer."""
        if layer not in self.layers:
            self.layers[layer] = self.make((key, value))
        keys, values = self.layers[layer]
        keys[places_M, :, offsets_M] = key
        values[places_M, :, offsets_M] = value
        return keys, values


@dataclass(frozen=True, eq=False, slots=True)
class Prefill:
    """Attention of whole prompts, each within itself; their keys and values are stored.

    Token `tokens[m]` of the flat row is stored at `offsets[m]` of place `places[m]`, all [M]: a prompt with
    several answers may be stored several times. `seen`: which tokens are the keys of the segments, where
    that is not each segment for itself.
    """

    buffers: Buffers
    segments: Segments
    tokens: Tensor
    places: Tensor
    offsets: Tensor
    seen: Tensor | None = None

    @classmethod
    def of(
        cls, buffers: Buffers, prompts: Layout, stored: Sequence[tuple[int, int, int]], device: torch.device
    ) -> "Prefill":
        """`stored`: token of the flat row, place and offset."""
        columns = torch.tensor(stored, dtype=torch.int64).to(device, non_blocking=True).unbind(1)
        seen = torch.tensor(prompts.seen).to(device, non_blocking=True) if prompts.shared else None
        return cls(buffers, prompts.segments(device), *columns, seen)

    def attend(self, module: nn.Module, heads: Heads) -> Tensor:
        """As swift.engines.attention.Attending."""
        stored = (x[0, :, self.tokens].transpose(0, 1) for x in (heads.key, heads.value))
        self.buffers.write(layer_index(module), self.places, self.offsets, *stored)
        if self.seen is not None:
            heads = replace(heads, key=heads.key[:, :, self.seen], value=heads.value[:, :, self.seen])
        return self.segments.attend(module, heads)


def spare_bytes(device: torch.device) -> int:
    """Memory that keys and values may take: a share of what is free on a GPU, of all on a CPU.

    Torch gives back first what it keeps: pieces between tensors that live would be counted, and not be found.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    return int(CPU_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def layer_index(module: nn.Module) -> int:
    """Which layer an attention belongs to, as transformers numbers them for its own caches."""
    index = module.layer_idx
    assert isinstance(index, int), type(module)
    return index
