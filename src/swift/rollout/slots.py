"""A cache of one slot a row, all of one length, and attention over it by torch: what a CPU answers with.

Shapes: R = rows in flight, H = query heads, K = key-value heads, C = capacity, D = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.engines.attention import Heads
from swift.rollout.cache import Buffers, Prefill, layer_index
from swift.rollout.prompts import Layout

FIRST_CAPACITY = 128  # tokens of a slot, doubled as answers grow


class Slots(Buffers):
    """Implements swift.rollout.cache.Cache over buffers [rows, K, C, D].

    What is beyond a row's length is zero or left over, never NaN: a mask would not hide that.
    """

    def __init__(self, max_rows: int, context: int, memory_bytes: int, device: torch.device) -> None:
        super().__init__()
        self.max_rows, self.context, self.memory_bytes = max_rows, context, memory_bytes
        self.device = device
        self.numbers = torch.arange(max_rows, device=device)
        self.rows = self.capacity = 0  # of the buffers
        self.size = 0  # rows in flight

    @property
    def most(self) -> int:
        return self.context

    def join(self, length: int, count: int, longest: int, *, whole: bool) -> int:  # noqa: ARG002
        room = self._fitting(longest) - self.size
        if whole and count > room:
            return 0
        joined = min(count, room)
        self.size += joined
        return joined

    def reading(self, prompts: Layout, counts: Sequence[int], longest: int) -> Prefill:
        self._reserve(self.size, longest)
        first = self.size - sum(counts)
        groups = zip(prompts.tokens, counts, strict=True)
        repeated = (tokens for tokens, count in groups for _ in range(count))
        stored = [
            (token, row, place)
            for row, tokens in enumerate(repeated, start=first)
            for place, token in enumerate(tokens)
        ]
        return Prefill.of(self, prompts, stored, self.device)

    def grow(self, lengths: Sequence[int]) -> int:
        longest = max(lengths)
        self.size = min(self.size, self._fitting(longest))
        self._reserve(self.size, longest)
        return self.size

    def decoding(self, lengths_R: Tensor, longest: int) -> "Decode":
        return Decode(self, self.numbers[: len(lengths_R)], lengths_R, longest)

    def remove(self, gone: Sequence[int], moves: Sequence[tuple[int, int]], longest: int) -> None:
        self.size -= len(gone)
        if not moves:
            return
        sources, targets = torch.tensor(moves).to(self.device).unbind(1)
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[targets, :, :longest] = buffer[sources, :, :longest]

    def clear(self) -> None:
        self.rows = self.capacity = self.size = 0
        self.layers = {}

    def make(self, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keys, values = (x.new_zeros(self.rows, x.shape[1], self.capacity, x.shape[2]) for x in like)
        return keys, values

    def _fitting(self, length: int) -> int:
        """How many rows of `length` tokens the memory holds, one at least; all before layers have written."""
        capacity = grown(max(self.capacity, FIRST_CAPACITY), length, self.context)
        row_bytes = capacity * sum(
            x.shape[1] * x.shape[3] * x.element_size() for buffers in self.layers.values() for x in buffers
        )
        return min(self.max_rows, max(self.memory_bytes // max(row_bytes, 1), 1))

    def _reserve(self, rows: int, length: int) -> None:
        """Makes room for so many rows of `length` tokens, which have to fit; what they hold stays."""
        if rows <= self.rows and length <= self.capacity:
            return
        limit = max(self._fitting(length), rows)
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


def grown(size: int, wanted: int, limit: int) -> int:
    """The size doubled until it is enough, but not beyond the limit."""
    assert wanted <= limit, (wanted, limit)
    size = max(size, 1)
    while size < wanted:
        size *= 2
    return min(size, limit)


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
