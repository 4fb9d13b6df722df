"""A vocabulary that is cut over tensor-parallel ranks, asked for what `DenseLogits` is asked for.

Every rank gets the same stats and computes the same loss from them; its gradient is that of its own columns.
Shapes: T = tokens of the batch, N = those with logits, V = vocabulary, v = this rank's columns of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from swift.objectives.logits import rows_at_once, widen


class Normalised(Function):
    """[N, v] logits and targets -> the target's logit and the log of the normaliser, [N] each, over all of V.

    The backward pass works the softmax out again, some rows at a time: the logits are all that is kept, as
    they are before they are divided by `heat`. `targets_N` count from this rank's first column; those of
    others lie outside [0, v).
    """

    @staticmethod
    def forward(
        ctx: Any, logits_Nv: Tensor, targets_N: Tensor, group: ProcessGroup, heat: float
    ) -> tuple[Tensor, Tensor]:
        rows = rows_at_once(logits_Nv)
        parts = logits_Nv.split(rows)
        highest_N = widen(torch.cat([part.amax(-1) for part in parts])) / heat
        dist.all_reduce(highest_N, dist.ReduceOp.MAX, group=group)
        sums = zip(parts, highest_N.split(rows), strict=True)
        total_N = torch.cat([fused(sum_exp)(part, high, heat) for part, high in sums])
        ours_N = (targets_N >= 0) & (targets_N < logits_Nv.shape[1])
        columns_N1 = targets_N.clamp(0, logits_Nv.shape[1] - 1)[:, None]
        target_N = widen(logits_Nv.gather(1, columns_N1)[:, 0]) / heat * ours_N
        both = torch.stack((total_N, target_N))
        dist.all_reduce(both, group=group)
        normaliser_N = both[0].log() + highest_N
        ctx.save_for_backward(logits_Nv, normaliser_N, columns_N1, ours_N)
        ctx.heat = heat
        return both[1].clone(), normaliser_N

    @staticmethod
    def backward(ctx: Any, of_target_N: Tensor, of_normaliser_N: Tensor) -> tuple[Tensor, None, None, None]:
        logits_Nv, normaliser_N, columns_N1, ours_N = ctx.saved_tensors
        gradient_Nv = torch.empty_like(logits_Nv)
        rows = rows_at_once(logits_Nv)
        pieces = (x.split(rows) for x in (gradient_Nv, logits_Nv, normaliser_N, of_normaliser_N))
        for into, logits, normaliser, weight in zip(*pieces, strict=True):
            into.copy_(fused(weigh_softmax)(logits, normaliser, weight, ctx.heat))
        of_target_N1 = (of_target_N * ours_N / ctx.heat)[:, None]
        gradient_Nv.scatter_add_(1, columns_N1, of_target_N1.to(gradient_Nv.dtype))
        return gradient_Nv, None, None, None


def sum_exp(logits_Nv: Tensor, highest_N: Tensor, heat: float) -> Tensor:
    """[N] sum of exp(logits / heat - highest) over the columns that are here."""
    return (widen(logits_Nv) / heat - highest_N[:, None]).exp().sum(-1)


def weigh_softmax(logits_Nv: Tensor, normaliser_N: Tensor, weight_N: Tensor, heat: float) -> Tensor:
    """[N, v] gradient of each row's normaliser times its weight, in the dtype of the logits."""
    softmax_Nv = (widen(logits_Nv) / heat - normaliser_N[:, None]).exp()
    return (softmax_Nv * (weight_N / heat)[:, None]).to(logits_Nv.dtype)


def mean_logit(logits_Nv: Tensor, normaliser_N: Tensor, heat: float) -> Tensor:
    """[N] what the columns that are here add to the mean of logits / heat under the softmax."""
    scaled_Nv = widen(logits_Nv) / heat
    return ((scaled_Nv - normaliser_N[:, None]).exp() * scaled_Nv).sum(-1)


@cache
def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` as one pass over its tensors, on a GPU."""
    return torch.compile(function, dynamic=True) if torch.cuda.is_available() else function


@dataclass(frozen=True)
class ShardedLogits:
    """Logits at N positions of the batch, columns `first` to `first + v` of the vocabulary."""

    logits_Nv: Tensor
    positions_N: Tensor  # int64 indices into [0, T)
    first: int
    vocabulary: int  # V; columns beyond it, which make the shares equal, are not here
    temperature: float = 1.0

    @cached_property
    def group(self) -> ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @classmethod
    def cut(
        cls, logits_Nv: Tensor, positions_N: Tensor, vocabulary: int, temperature: float = 1.0
    ) -> "ShardedLogits":
        """This rank's logits as its output layer made them."""
        first = parallel_state.get_tensor_model_parallel_rank() * logits_Nv.shape[1]
        count = min(logits_Nv.shape[1], max(vocabulary - first, 0))
        return cls(logits_Nv[:, :count], positions_N, first, vocabulary, temperature)

    def _normalise(self, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        target_N, normaliser_N = Normalised.apply(
            self.logits_Nv, labels_T[self.positions_N] - self.first, self.group, self.temperature
        )
        return target_N, normaliser_N

    def place(self, values_N: Tensor, labels_T: Tensor) -> Tensor:
        return values_N.new_zeros(labels_T.shape).index_copy(0, self.positions_N, values_N)

    def logps(self, labels_T: Tensor) -> Tensor:
        target_N, normaliser_N = self._normalise(labels_T)
        return self.place(target_N - normaliser_N, labels_T)

    def correct(self, labels_T: Tensor) -> Tensor:
        highest_N, at_N = self.logits_Nv.detach().max(-1)
        best_N = highest_N.clone()
        dist.all_reduce(best_N, dist.ReduceOp.MAX, group=self.group)
        at_N = torch.where(highest_N == best_N, at_N + self.first, self.vocabulary)
        dist.all_reduce(at_N, dist.ReduceOp.MIN, group=self.group)
        return self.place(at_N == labels_T[self.positions_N], labels_T)

    def _mean(self, logits_Nv: Tensor) -> Tensor:
        total_N = logits_Nv.sum(-1, dtype=torch.promote_types(logits_Nv.dtype, torch.float32))
        return reduce_from_tensor_model_parallel_region(total_N) / (self.vocabulary * self.temperature)

    def logits_mean(self, labels_T: Tensor) -> Tensor:
        return self.place(self._mean(self.logits_Nv.detach()), labels_T)

    def mean_logps(self, labels_T: Tensor) -> Tensor:
        return self.place(self._mean(self.logits_Nv) - self._normalise(labels_T)[1], labels_T)

    def entropy(self, labels_T: Tensor) -> Tensor:
        logits_Nv = self.logits_Nv.detach()
        with torch.no_grad():
            normaliser_N = self._normalise(labels_T)[1]
            rows = rows_at_once(logits_Nv)
            pieces = zip(logits_Nv.split(rows), normaliser_N.split(rows), strict=True)
            mean_N = torch.cat([fused(mean_logit)(part, norm, self.temperature) for part, norm in pieces])
            dist.all_reduce(mean_N, group=self.group)
        return self.place(normaliser_N - mean_N, labels_T)

    def pick(self, ids_NK: Tensor) -> Tensor:
        columns_NK = ids_NK - self.first
        ours_NK = (columns_NK >= 0) & (columns_NK < self.logits_Nv.shape[1])
        picked_NK = self.logits_Nv.gather(1, columns_NK.clamp(0, self.logits_Nv.shape[1] - 1))
        return reduce_from_tensor_model_parallel_region(widen(picked_NK) * ours_NK) / self.temperature
