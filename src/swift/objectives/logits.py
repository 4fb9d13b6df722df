"""Per-token quantities from logits. Nobody else touches a tensor of vocabulary width.

Shapes: T = tokens of the batch, N = the trained ones among them, V = vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True, slots=True)
class DenseLogits:
    """Logits of the trained positions only: the output layer is never run on a prompt.

    The vocabulary seen through what objectives ask of it; sums run in float32 at least.
    """

    logits_NV: Tensor
    positions_N: Tensor  # int64 indices into [0, T)

    def logps(self, labels_T: Tensor) -> Tensor:
        """[T] log p(labels[t]), 0 at positions without logits."""
        wide_NV = widen(self.logits_NV)
        logps_N = -F.cross_entropy(wide_NV, labels_T[self.positions_N], reduction="none")
        return logps_N.new_zeros(labels_T.shape).index_copy(0, self.positions_N, logps_N)

    def correct(self, labels_T: Tensor) -> Tensor:
        """[T] bool: labels[t] has the highest logit."""
        hit_N = self.logits_NV.detach().argmax(-1) == labels_T[self.positions_N]
        return torch.zeros_like(labels_T, dtype=torch.bool).index_copy(0, self.positions_N, hit_N)

    def logits_mean(self, labels_T: Tensor) -> Tensor:
        """[T] mean logit over the vocabulary, without gradient, 0 at positions without logits."""
        logits_NV = self.logits_NV.detach()
        mean_N = logits_NV.mean(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
        return mean_N.new_zeros(labels_T.shape).index_copy(0, self.positions_N, mean_N)

    def mean_logps(self, labels_T: Tensor) -> Tensor:
        """[T] log p averaged over the vocabulary, 0 at positions without logits."""
        wide_NV = widen(self.logits_NV)
        mean_N = wide_NV.mean(-1) - wide_NV.logsumexp(-1)
        return mean_N.new_zeros(labels_T.shape).index_copy(0, self.positions_N, mean_N)
