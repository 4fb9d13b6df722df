"""Sums over segments and pairs, and what an objective does with the engine's filler batch.

Shapes: T = tokens of the batch, S = segments, P = pairs (segments 2p and 2p + 1). Not here: any loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from swift.batch import Batch
from swift.objectives.types import LossSum


def segment_sum(values_T: Tensor, batch: Batch) -> Tensor:
    """[S]: the sum of the values of each segment; shapes are known beforehand, so nothing waits for a GPU."""
    return values_T.new_zeros(batch.num_segments).index_add(0, batch.segment_ids, values_T)


def trained_counts(batch: Batch, like: Tensor) -> Tensor:
    """[S]: trained tokens of each segment, in the dtype of `like`."""
    return segment_sum(batch.trained.to(like.dtype), batch)


def pair_up(values_S: Tensor) -> Tensor:
    """[P, 2]: chosen and rejected side by side; a last segment without a partner is left out."""
    pairs = values_S.shape[0] // 2
    return values_S[: 2 * pairs].view(pairs, 2)


def is_filler(batch: Batch) -> bool:
    """Whether this is the engine's batch without rows: one untrained token and no columns."""
    return batch.num_tokens == 1 and not batch.token and not batch.segment


def column(batch: Batch, name: str, like: Tensor) -> Tensor:
    """The [T] or [S] column `name` in the dtype of `like`; zeros shaped as `like` in a filler batch.

    Raises KeyError when a real batch lacks it.
    """
    if is_filler(batch):
        return torch.zeros_like(like)
    columns = batch.token if name in batch.token else batch.segment
    return columns[name].to(like.dtype)


def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """A metric: the sum of the values and how many they are."""
    values = values.detach()
    return values.sum(), values.new_full((), values.numel())


def weighted(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A metric: the sum of the weighted values and the sum of the weights."""
    weights = weights.to(values.dtype)
    return (values.detach() * weights).sum(), weights.sum()


def extreme(values: Tensor, there: Tensor, pick: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A metric: `pick`, torch.amin or torch.amax, of the values that are `there`, and whether any is.

    Its name has to say so: see Sums.
    """
    nowhere = torch.inf if pick is torch.amin else -torch.inf
    found, any_there = pick(torch.where(there, values.detach(), nowhere)), there.any()
    return torch.where(any_there, found, 0.0), any_there.to(values.dtype)


def settle(result: LossSum, batch: Batch) -> LossSum:
    """`result`, or for a filler batch the same names with zeros that still lead back to the model."""
    if not is_filler(batch):
        return result
    terms = {unit: term * 0.0 for unit, term in result.terms.items()}
    return LossSum(terms, {k: (total * 0, count * 0) for k, (total, count) in result.metrics.items()})
