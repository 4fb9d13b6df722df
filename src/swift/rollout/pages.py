"""A cache of pages that rows take as they grow, for a GPU; answers to one prompt share its pages.

Nothing moves when rows come and go, so that a recorded CUDA graph stays good: only tables change.
Source: Kwon et al.: Efficient memory management for large language model serving with PagedAttention,
arXiv:2309.06180.
Shapes: R = rows in flight, H = query heads, K = key-value heads, D = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from swift.config.option import ConfigError
from swift.engines.attention import Heads
from swift.rollout.cache import Buffers, Prefill, layer_index
from swift.rollout.prompts import Layout

PAGE = 64  # tokens


class Pages(Buffers):
    """Implements swift.rollout.cache.Cache over buffers [pages, K, PAGE, D].

    Page 0 belongs to nobody: rows that are not in flight point to it, and a graph may write there.
    """

    def __init__(
        self, max_rows: int, context: int, memory_bytes: int, device: torch.device, *, layers: int
    ) -> None:
        super().__init__()
        self.max_rows, self.memory_bytes, self.device = max_rows, memory_bytes, device
        self.model_layers = layers
        self.table = torch.zeros(max_rows, -(-context // PAGE), dtype=torch.int32, device=device)
        self.clear()

    @property
    def most(self) -> int:
        return (self.count - 1) * PAGE

    def clear(self) -> None:
        self.layers = {}
        self.count = 1 + self.table.numel()  # of pages; less where memory holds less, once that is known
        self.free = list(range(self.count - 1, 0, -1))
        self.users = [0] * self.count
        self.held: list[list[int]] = []  # pages of each row, in order
        self.table.zero_()

    def join(self, length: int, count: int, longest: int, *, whole: bool) -> int:  # noqa: ARG002
        shared, tail = divmod(length, PAGE)
        each = bool(tail)
        # Rows in flight keep a page each to grow into: who joins now is not to be thrown out at once.
        spare = len(self.free) - shared - (len(self.held) + count if self.held else 0)
        room = min(self.max_rows - len(self.held), spare // each if each else count)
        if room < (count if whole else 1) or spare < 0:
            if not self.held:
                raise ConfigError(
                    f"memory holds keys and values of {self.most:,} tokens, not of a prompt of {length:,}",
                    hint="shorter prompts, or a model that leaves more memory free",
                )
            return 0
        joined = min(count, room)
        common = [self._take() for _ in range(shared)]
        for page in common:
            self.users[page] = joined
        self.held += [common + [self._take() for _ in range(each)] for _ in range(joined)]
        return joined

    def reading(self, prompts: Layout, counts: Sequence[int], longest: int) -> Prefill:  # noqa: ARG002
        first = row = len(self.held) - sum(counts)
        stored = []
        for tokens, count in zip(prompts.tokens, counts, strict=True):
            whole = len(tokens) // PAGE * PAGE
            stored += [(tokens[i], self.held[row][i // PAGE], i % PAGE) for i in range(whole)]
            for pages in self.held[row : row + count]:
                stored += [(tokens[i], pages[-1], i % PAGE) for i in range(whole, len(tokens))]
            row += count
        width = max(map(len, self.held[first:]))
        lines = [pages + [0] * (width - len(pages)) for pages in self.held[first:]]
        self.table[first:row, :width] = torch.tensor(lines, dtype=torch.int32).to(self.device)
        return Prefill.of(self, prompts, stored, self.device)

    def grow(self, lengths: Sequence[int]) -> int:
        growing = [r for r, length in enumerate(lengths) if length > len(self.held[r]) * PAGE]
        before = len(self.held)
        while len(self.free) < len(growing):
            assert len(self.held) > 1, "no row is longer than memory holds"
            self._release(self.held.pop())
            if growing[-1] == len(self.held):
                growing.pop()
        size = len(self.held)
        self.table[size:before] = 0
        if growing:
            new = [(r, len(self.held[r]), self._take()) for r in growing]
            for row, _, page in new:
                self.held[row].append(page)
            rows, columns, pages = torch.tensor(new).to(self.device).unbind(1)
            self.table[rows, columns] = pages.int()
        return size

    def decoding(self, lengths_R: Tensor, longest: int) -> "PagedDecode":  # noqa: ARG002
        table = self.table[: len(lengths_R)]
        own = table.gather(1, (lengths_R // PAGE)[:, None])[:, 0].long()
        return PagedDecode(self, table, lengths_R, own, lengths_R % PAGE)

    def remove(self, gone: Sequence[int], moves: Sequence[tuple[int, int]], longest: int) -> None:  # noqa: ARG002
        for row in gone:
            self._release(self.held[row])
        for source, target in moves:
            self.held[target] = self.held[source]
        if moves:
            sources, targets = torch.tensor(moves).to(self.device).unbind(1)
            self.table[targets] = self.table[sources]
        before, size = len(self.held), len(self.held) - len(gone)
        del self.held[size:]
        self.table[size:before] = 0

    def make(self, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not self.layers:
            page_bytes = PAGE * self.model_layers * sum(x[0].numel() * x.element_size() for x in like)
            taken = self.count - len(self.free)
            self.count = max(min(self.count, self.memory_bytes // page_bytes), taken)
            self.free = [page for page in self.free if page < self.count]
        keys, values = (x.new_empty(self.count, x.shape[1], PAGE, x.shape[2]) for x in like)
        return keys, values

    def _take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)


@dataclass(frozen=True, eq=False, slots=True)
class PagedDecode:
    """Attention of one token a row: it is stored behind `lengths[r]` others of row r, [R], and sees them.

    `own`, `offsets` [R]: the page that each row writes to, and where.
    """

    pages: Pages
    table: Tensor
    lengths: Tensor
    own: Tensor
    offsets: Tensor

    def attend(self, module: nn.Module, heads: Heads) -> Tensor:
        """As swift.engines.attention.Attending."""
        assert not heads.dropout, "answers are given in evaluation mode"
        stored = (x[0].transpose(0, 1) for x in (heads.key, heads.value))
        keys, values = self.pages.write(layer_index(module), self.own, self.offsets, *stored)
        scale = heads.query.shape[-1] ** -0.5 if heads.scaling is None else heads.scaling
        attend = import_module("swift.rollout.kernels").attend_pages  # Triton is for GPUs
        query = heads.query[0].transpose(0, 1)
        output = attend(query, keys, values, self.table, self.lengths, scale=scale, window=heads.window)
        return output.transpose(0, 1)[None]
