"""Reward models: one score for each answer, the chosen above the rejected.

Pairs are adjacent segments as in preference.py; segment["margin"] [S] is read where the rows have one.
Shapes: S = segments, P = pairs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from swift.batch import Batch
from swift.objectives.reduce import mean_of, pair_up
from swift.objectives.types import LossSum, Objective, TokenStats


@dataclass(frozen=True)
class Reward(Objective):
    """Bradley-Terry likelihood of the pairs.

    The chosen answer has to win by segment["margin"] (its own segment's entry; arXiv:2307.09288 eq. 2).
    `center` pulls the sum of both scores towards 0 (arXiv:2312.09244 eq. 2): scores are only
    known up to a constant otherwise.
    """

    center: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    def units(self, batch: Batch) -> dict[str, int]:
        return {"pairs": batch.num_segments // 2}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.scores is not None, "Reward needs scores"
        scores = pair_up(stats.scores)
        lead_P = scores[:, 0] - scores[:, 1]
        ahead_P = lead_P
        if "margin" in batch.segment:
            ahead_P = lead_P - pair_up(batch.segment["margin"].to(lead_P.dtype))[:, 0]
        loss_P = -F.logsigmoid(ahead_P) + self.center * scores.sum(1).square()
        metrics = {
            "rewards/chosen": mean_of(scores[:, 0]),
            "rewards/rejected": mean_of(scores[:, 1]),
            "rewards/accuracies": mean_of((lead_P > 0).to(lead_P.dtype)),
            "rewards/margins": mean_of(lead_P),
        }
        return LossSum({"pairs": loss_P.sum() + stats.scores.sum() * 0.0}, metrics)
