"""Classification heads: one class, several labels, or numbers for each segment.

Shapes: S = segments, C = classes. segment["label"] is [S] class numbers, or [S, C] of 0 and 1, or [S, C] (or
[S] with C = 1) numbers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.batch import Batch
from swift.objectives.reduce import column, is_filler, mean_of, settle
from swift.objectives.types import LossSum, Objective, TokenStats


def _one_class(logits_SC: Tensor, label_S: Tensor) -> tuple[Tensor, Tensor]:
    label_S = label_S.long()
    return F.cross_entropy(logits_SC, label_S, reduction="none"), logits_SC.argmax(-1) == label_S


def _several_labels(logits_SC: Tensor, label_SC: Tensor) -> tuple[Tensor, Tensor]:
    loss_SC = F.binary_cross_entropy_with_logits(logits_SC, label_SC, reduction="none")
    return loss_SC.mean(-1), ((logits_SC > 0) == (label_SC > 0.5)).all(-1)


def _numbers(logits_SC: Tensor, label_SC: Tensor) -> tuple[Tensor, None]:
    return (logits_SC - label_SC).square().mean(-1), None


PROBLEMS = {
    "single_label_classification": _one_class,
    "multi_label_classification": _several_labels,
    "regression": _numbers,
}


@dataclass(frozen=True)
class Classification(Objective):
    """Cross entropy, binary cross entropy or squared error, each a mean over classes and a sum over rows.

    The metric `acc` counts a row of several labels only when all of them are right; numbers have none.
    """

    problem_type: str = "single_label_classification"

    needs: ClassVar[frozenset[str]] = frozenset({"class_logits"})

    @property
    def is_one_class(self) -> bool:
        return self.problem_type == "single_label_classification"

    def units(self, batch: Batch) -> dict[str, int]:
        return {"sequences": 0 if is_filler(batch) else batch.num_segments}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        logits_SC = stats.class_logits
        assert logits_SC is not None, "Classification needs class_logits"
        label = column(batch, "label", logits_SC.detach())
        if self.is_one_class:
            label = label[:, 0] if is_filler(batch) else label
        else:
            label = label.view_as(logits_SC)
        loss_S, right_S = PROBLEMS[self.problem_type](logits_SC, label)
        metrics = {} if right_S is None else {"acc": mean_of(right_S.to(torch.float32))}
        return settle(LossSum({"sequences": loss_S.sum()}, metrics), batch)
