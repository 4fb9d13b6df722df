"""Per-token quantities from logits. Nobody else touches a tensor of vocabulary width.

Shapes: T = tokens of the batch, N = the trained ones among them, n = some of N, V = vocabulary, K = given
ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

CHUNK_BYTES = 2**28  # of float32 logits that are in memory at once, beside those of the model


def widen(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


def rows_at_once(logits: Tensor, copies: int = 1) -> int:
    """Rows of which as many float32 copies stay within CHUNK_BYTES."""
    return max(CHUNK_BYTES // (4 * copies * logits.shape[1]), 1)


@dataclass(frozen=True, slots=True)
class DenseLogits:
    """Logits of the trained positions only: the output layer is never run on a prompt.

    The vocabulary seen through what objectives ask of it, logits divided by `temperature`; sums run in
    float32 at least. All quantities are 0 at positions without logits.
    """

    logits_NV: Tensor
    positions_N: Tensor  # int64 indices into [0, T)
    temperature: float = 1.0

    def _wide(self) -> Tensor:
        wide_NV = widen(self.logits_NV)
        return wide_NV if self.temperature == 1 else wide_NV / self.temperature

    def place(self, values_N: Tensor, labels_T: Tensor) -> Tensor:
        """[T] of values of the trained positions."""
        return values_N.new_zeros(labels_T.shape).index_copy(0, self.positions_N, values_N)

    def logps(self, labels_T: Tensor) -> Tensor:
        """[T] log p(labels[t])."""
        logps_N = -F.cross_entropy(self._wide(), labels_T[self.positions_N], reduction="none")
        return self.place(logps_N, labels_T)

    def correct(self, labels_T: Tensor) -> Tensor:
        """[T] bool: labels[t] has the highest logit."""
        return self.place(self.logits_NV.detach().argmax(-1) == labels_T[self.positions_N], labels_T)

    def logits_mean(self, labels_T: Tensor) -> Tensor:
        """[T] mean logit over the vocabulary, without gradient."""
        logits_NV = self.logits_NV.detach()
        mean_N = logits_NV.mean(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
        return self.place(mean_N / self.temperature, labels_T)

    def mean_logps(self, labels_T: Tensor) -> Tensor:
        """[T] log p averaged over the vocabulary."""
        wide_NV = self._wide()
        return self.place(wide_NV.mean(-1) - wide_NV.logsumexp(-1), labels_T)

    def entropy(self, labels_T: Tensor) -> Tensor:
        """[T] nats, without gradient; some rows at a time."""
        logits_NV = self.logits_NV.detach()
        parts = logits_NV.split(rows_at_once(logits_NV, copies=3))
        found = [torch.special.entr((widen(p) / self.temperature).softmax(-1)).sum(-1) for p in parts]
        return self.place(torch.cat(found), labels_T)

    def pick(self, ids_NK: Tensor) -> Tensor:
        """[N, K] logits of the given ids."""
        return widen(self.logits_NV.gather(1, ids_NK)) / self.temperature


Judge = Callable[[Tensor, slice], Tensor]  # [n, V] logits and which rows they are -> [n]


class Judged(Function):
    """What `judge` says of the logits, [N], `count` rows at a time; worked out again in the backward pass.

    So nothing of vocabulary width is kept but the logits, however much `judge` makes of a row.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, judge: Judge, count: int) -> Tensor:
        ctx.save_for_backward(logits_NV)
        ctx.judge, ctx.count = judge, count
        return torch.cat([judge(logits_NV[rows], rows) for rows in chunks(len(logits_NV), count)])

    @staticmethod
    def backward(ctx: Any, of_value_N: Tensor) -> tuple[Tensor, None, None]:
        (logits_NV,) = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for rows in chunks(len(logits_NV), ctx.count):
            with torch.enable_grad():
                part = logits_NV[rows].detach().requires_grad_()
                value_n = ctx.judge(part, rows)
            gradient_NV[rows] = torch.autograd.grad(value_n, part, of_value_N[rows])[0]
        return gradient_NV, None, None


def chunks(rows: int, count: int) -> list[slice]:
    """All rows, `count` in a piece; one that is empty where there are none."""
    return [slice(start, min(start + count, rows)) for start in range(0, max(rows, 1), count)]
