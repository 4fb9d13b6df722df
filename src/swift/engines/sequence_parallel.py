"""Ulysses: the ranks of a sequence group hold slices of one flat batch, and exchange heads around attention.

Everything but attention looks at one token at a time, so it runs on the slice. Attention runs on all T tokens
and 1/N of the heads. Source: arXiv:2309.14509. Each rank then gets the stats of the whole batch; objectives
need not know: the gradient of a rank is that of its own slice, and the sum over ranks is the whole.
Shapes: T = flat tokens, t = T / N those of a rank, H = query heads, K = key-value heads, D = head width.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from swift.batch import IGNORED, Batch


@dataclass(frozen=True)
class SequenceRanks:
    """This process among those that share a batch; alone by default."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def pad(self, batch: Batch, multiple: int = 1) -> Batch:
        """t made a multiple by an untrained segment at the end; `token` and `segment` are left alone."""
        missing = -batch.num_tokens % (self.size * multiple)
        if not missing:
            return batch
        return replace(
            batch,
            input_ids=F.pad(batch.input_ids, (0, missing)),
            labels=F.pad(batch.labels, (0, missing), value=IGNORED),
            segment_ids=F.pad(batch.segment_ids, (0, missing), value=batch.num_segments),
            num_segments=batch.num_segments + 1,
        )

    def own(self, values: Tensor) -> Tensor:
        """The slice [..., t] of this rank."""
        return values.chunk(self.size, dim=-1)[self.rank]

    def join(self, values_t: Tensor) -> Tensor:
        """[T] on every rank, without gradients."""
        parts = [torch.empty_like(values_t) for _ in range(self.size)]
        dist.all_gather(parts, values_t.contiguous(), group=self.group)
        return torch.cat(parts)

    def gather(self, values_t: Tensor) -> Tensor:
        """[T] on every rank, each of which computes the same loss: backward keeps the own tokens."""
        if self.size == 1:
            return values_t
        if values_t.dtype == torch.bool:
            return Gather.apply(values_t.to(torch.uint8), self).bool()
        return Gather.apply(values_t, self)

    def spread_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, H, t, D] and twice [1, K, t, D] -> [1, H / N, T, D] and key-value heads that go with them.

        Key-value heads are repeated to lcm(K, N), which divides H because K and N do.
        """
        copies = math.lcm(key.shape[1], self.size) // key.shape[1]
        repeated = (t.repeat_interleave(copies, dim=1) if copies > 1 else t for t in (key, value))
        query, key, value = (Exchange.apply(t, 1, 2, self) for t in (query, *repeated))
        return query, key, value

    def spread_tokens(self, output: Tensor) -> Tensor:
        """[1, H / N, T, D] -> [1, H, t, D]."""
        return Exchange.apply(output, 2, 1, self)


ALONE = SequenceRanks()


class Exchange(Function):
    """Cuts a tensor along one axis, sends part i to rank i, and joins what arrives along another axis."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: int, join: int, ranks: SequenceRanks) -> Tensor:
        ctx.reverse = (join, cut, ranks)
        return exchange(tensor, cut, join, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(gradient, *ctx.reverse), None, None, None


def exchange(tensor: Tensor, cut: int, join: int, ranks: SequenceRanks) -> Tensor:
    """One all-to-all, without gradients."""
    parts = torch.stack(tensor.chunk(ranks.size, dim=cut))
    arrived = torch.empty_like(parts)
    dist.all_to_all_single(arrived, parts, group=ranks.group)
    return torch.cat(arrived.unbind(0), dim=join)


class Gather(Function):
    """[t] of each rank -> [T] on all of them, as replicas."""

    @staticmethod
    def forward(ctx: Any, values_t: Tensor, ranks: SequenceRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.join(values_t)

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.own(gradient_T), None
