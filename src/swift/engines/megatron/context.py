"""Context parallelism: ranks that share the tokens of one flat batch in every layer, but not in attention.

`all_gather`: T is cut into 2N chunks and rank r holds r and 2N - 1 - r, so that all have as much attention to
do (arXiv:2407.21783 section 3.3.2); keys and values of all tokens are gathered, queries stay. `a2a`: rank r
holds the r-th slice, and ranks exchange tokens for heads around attention (sequence_parallel.py).
Each rank gets the stats of all T tokens and computes the same loss; its gradient is that of its own tokens,
and the sum over ranks is the whole.
Shapes: T = flat tokens, t = T / N those of a rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from swift.batch import Batch
from swift.engines.attention import Segments
from swift.engines.sequence_parallel import SequenceRanks

Kind = Literal["all_gather", "a2a"]


@dataclass(frozen=True, eq=False, slots=True)
class Stretch:
    """Queries of a rank that follow on each other, and the keys that they may see: a run of all T.

    The pieces of `queries` and `queries.keys` belong together in turn and end at the same token.
    """

    queries: Segments
    first_key: int
    last_key: int  # one past it


@dataclass(frozen=True)
class ContextRanks(SequenceRanks):
    """This process among those that share a batch."""

    kind: Kind = "all_gather"

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Which of the equal chunks of T a rank holds, in order."""
        return (rank,) if self.kind == "a2a" or self.size == 1 else (rank, 2 * self.size - 1 - rank)

    @property
    def num_chunks(self) -> int:
        return self.size * len(self.chunks(0))

    def pad(self, batch: Batch, multiple: int = 1) -> Batch:
        """As there, and all chunks made equal."""
        return super().pad(batch, math.lcm(self.num_chunks // self.size, multiple))

    def own(self, values: Tensor) -> Tensor:
        """[..., T] -> [..., t] of this rank."""
        parts = values.chunk(self.num_chunks, dim=-1)
        return torch.cat([parts[i] for i in self.chunks(self.rank)], dim=-1)

    def join(self, tokens: Tensor) -> Tensor:
        """[t, ...] -> [T, ...] in order, without gradients."""
        arrived = tokens.new_empty(self.size * tokens.shape[0], *tokens.shape[1:])
        dist.all_gather_into_tensor(arrived, tokens.contiguous(), group=self.group)
        held = [chunk for rank in range(self.size) for chunk in self.chunks(rank)]
        parts = arrived.chunk(self.num_chunks)
        return torch.cat([parts[held.index(chunk)] for chunk in range(self.num_chunks)])

    def gather_keys(self, tokens: Tensor) -> Tensor:
        """[t, ...] -> [T, ...] in order; backward sums over ranks."""
        return GatherTokens.apply(tokens, self)

    def stretches(self, lengths: Sequence[int], device: torch.device) -> tuple[Stretch, ...]:
        """The queries of this rank in a batch of segments of `lengths`, whose sum is T."""
        total = sum(lengths)
        if self.kind == "a2a" or self.size == 1:
            return (Stretch(Segments.of(list(lengths), device), 0, total),)
        step = total // self.num_chunks
        return tuple(stretch(lengths, i * step, (i + 1) * step, device) for i in self.chunks(self.rank))


def stretch(lengths: Sequence[int], first: int, last: int, device: torch.device) -> Stretch:
    """The queries from `first` up to `last`. Those of a segment see its tokens from its start."""
    queries, keys, first_key, start = [], [], first, 0
    for length in lengths:
        end = min(start + length, last)
        if end > max(start, first):
            first_key = min(first_key, start)
            queries.append(end - max(start, first))
            keys.append(end - start)
        start += length
    return Stretch(Segments.of(queries, device, keys=Segments.of(keys, device)), first_key, last)


class GatherTokens(Function):
    """[t, ...] of each rank -> [T, ...] on all of them, each of which uses it in its own way."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, ranks: ContextRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.join(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.ranks
        parts = gradient.chunk(ranks.num_chunks)
        sent = torch.cat([parts[chunk] for rank in range(ranks.size) for chunk in ranks.chunks(rank)])
        summed = gradient.new_empty(gradient.shape[0] // ranks.size, *gradient.shape[1:])
        dist.reduce_scatter_tensor(summed, sent, group=ranks.group)
        return summed, None
