"""Keys and values of the answers in flight: one slot a row, rows dense in front, and attention over them.

Shapes: R = rows in flight, N = flat tokens, H = query heads, K = key-value heads, C = capacity, D = head
width.
Not here: which row belongs to whom (decoder.py).
"""

import os
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.engines.attention import Heads, Segments

FIRST_CAPACITY = 128  # tokens of a slot, doubled as answers grow
SHARE = 0.6  # of free memory, for keys and values: prompts need room for what is computed on the way


class Slots:
    """Buffers [rows, K, C, D] of each layer, made when the layer first writes: it knows shape and dtype.

    What is beyond a row's length is zero or left over, never NaN: a mask would not hide that.
    """

    def __init__(self, max_rows: int, context: int, memory_bytes: int) -> None:
        self.max_rows, self.context, self.memory_bytes = max_rows, context, memory_bytes
        self.rows = self.capacity = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values

    def fitting(self, length: int) -> int:
        """How many rows of `length` tokens the memory holds, one at least; all before layers have written."""
        capacity = grown(max(self.capacity, FIRST_CAPACITY), length, self.context)
        row_bytes = capacity * sum(
            x.shape[1] * x.shape[3] * x.element_size() for buffers in self.layers.values() for x in buffers
        )
        return min(self.max_rows, max(self.memory_bytes // max(row_bytes, 1), 1))

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for so many rows of `length` tokens, which have to fit; what they hold stays."""
        if rows <= self.rows and length <= self.capacity:
            return
        limit = max(self.fitting(length), rows)
        self.rows = min(grown(self.rows, rows, self.max_rows), limit)
        self.capacity = grown(max(self.capacity, FIRST_CAPACITY), length, self.context)
        for layer in self.layers:  # one after the other: never two copies of everything
            self.layers[layer] = tuple(self._enlarge(old) for old in self.layers[layer])  # type: ignore[assignment]

    def _enlarge(self, old: Tensor) -> Tensor:
        _, heads, capacity, width = old.shape
        new = old.new_zeros(self.rows, heads, self.capacity, width)
        rows = min(len(old), self.rows)
        new[:rows, :, :capacity] = old[:rows]
        return new

    def write(
        self, layer: int, rows_N: Tensor, positions_N: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Puts key and value [N, K, D] at places of rows; the buffers of the layer."""
        if layer not in self.layers:
            shapes = ((self.rows, x.shape[1], self.capacity, x.shape[2]) for x in (key, value))
            keys, values = (x.new_zeros(shape) for x, shape in zip((key, value), shapes, strict=True))
            self.layers[layer] = keys, values
        keys, values = self.layers[layer]
        keys[rows_N, :, positions_N] = key
        values[rows_N, :, positions_N] = value
        return keys, values

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies the first `length` tokens of rows over others."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[targets, :, :length] = buffer[sources, :, :length]

    def clear(self) -> None:
        """Frees the memory; no row is left."""
        self.rows = self.capacity = 0
        self.layers = {}


def grown(size: int, wanted: int, limit: int) -> int:
    """The size doubled until it is enough, but not beyond the limit."""
    assert wanted <= limit, (wanted, limit)
    size = max(size, 1)
    while size < wanted:
        size *= 2
    return min(size, limit)


@dataclass(frozen=True, eq=False, slots=True)
class Prefill:
    """Attention of whole prompts, each within itself; their keys and values go into slots.

    Token `tokens[n]` of the flat row is stored at `positions[n]` of row `rows[n]`, all [N]: a prompt that is
    answered several times appears in several rows. `seen`: which tokens are the keys of the segments, where
    that is not each segment for itself.
    """

    slots: Slots
    segments: Segments
    tokens: Tensor
    rows: Tensor
    positions: Tensor
    seen: Tensor | None = None

    def attend(self, module: nn.Module, heads: Heads) -> Tensor:
        """As swift.engines.attention.Attending."""
        stored = (x[0, :, self.tokens].transpose(0, 1) for x in (heads.key, heads.value))
        self.slots.write(layer_index(module), self.rows, self.positions, *stored)
        if self.seen is not None:
            heads = replace(heads, key=heads.key[:, :, self.seen], value=heads.value[:, :, self.seen])
        return self.segments.attend(module, heads)


@dataclass(frozen=True, eq=False, slots=True)
class Decode:
    """Attention of one token a row: it is stored at `lengths[r]` of row r, [R], and sees what is before it.

    `longest`: beyond the tokens of every row, the new ones included.
    """

    slots: Slots
    rows: Tensor
    lengths: Tensor
    longest: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, module: nn.Module, heads: Heads) -> Tensor:
        """As swift.engines.attention.Attending."""
        assert not heads.dropout, "answers are given in evaluation mode"
        stored = (x[0].transpose(0, 1) for x in (heads.key, heads.value))
        keys, values = self.slots.write(layer_index(module), self.rows, self.lengths, *stored)
        R, K = heads.query.shape[2], heads.key.shape[1]
        # Heads that share a key are queries of one head: any kernel takes that, and nothing is repeated.
        query = heads.query[0].transpose(0, 1).unflatten(1, (K, -1))
        seen = (x[:R, :, : self.longest] for x in (keys, values))
        mask = self._mask(heads.window, query)
        output = F.scaled_dot_product_attention(query, *seen, attn_mask=mask, scale=heads.scaling)
        return output.flatten(1, 2).transpose(0, 1)[None]

    def _mask(self, window: int | None, like: Tensor) -> Tensor:
        """[R, 1, 1, longest] to be added: 0 for keys that a row sees, else -inf; one for layers of a kind."""
        if window not in self.masks:
            distance = self.lengths[:, None] - torch.arange(self.longest, device=self.lengths.device)
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            # A mask of booleans would be turned into this by every layer.
            self.masks[window] = like.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
        return self.masks[window]


def spare_bytes(device: torch.device) -> int:
    """Memory that keys and values may take: a share of what is free on a GPU, of all on a CPU."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
    return int(SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def layer_index(module: nn.Module) -> int:
    """Which layer an attention belongs to, as transformers numbers them for its own caches."""
    index = module.layer_idx
    assert isinstance(index, int), type(module)
    return index
