"""KTO: answers that are liked or not, one at a time.

Columns: token["ref_logps"] [T], segment["label"] [S] (1 liked, 0 not) and, for the loss "kto", segment["kl"]
[S], the same estimate of the policy's distance on every row. Not here: how that estimate is made.
Shapes: T = tokens, S = segments.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from swift.batch import Batch
from swift.objectives.reduce import column, is_filler, segment_sum, settle, weighted
from swift.objectives.types import LossSum, Objective, TokenStats


@dataclass(frozen=True)
class Kto(Objective):
    """KTO, arXiv:2402.01306 eq. 7, and APO-zero for single answers, arXiv:2408.06266 eq. 7.

    With "apo_zero_unpaired" the baseline is 0 instead of the estimated distance. Averaged over all answers:
    a weight of 2 doubles the pull of its kind and leaves the other's alone. The metric `rewards/accuracies`
    is the share of answers on their side of the baseline.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "logits_mean"})

    def units(self, batch: Batch) -> dict[str, int]:
        return {"sequences": 0 if is_filler(batch) else batch.num_segments}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.logps is not None and stats.logits_mean is not None, "Kto needs logps and logits_mean"
        logps_S = segment_sum(stats.logps * batch.trained, batch)
        ref_S = segment_sum(column(batch, "ref_logps", stats.logps.detach()) * batch.trained, batch)
        liked_S = column(batch, "label", logps_S.detach())
        rewards_S = self.beta * (logps_S - ref_S)
        zeros_S = torch.zeros_like(ref_S)
        kl_S = column(batch, "kl", ref_S).clamp(min=0) if self.loss_type == "kto" else zeros_S
        margin_S = (2 * liked_S - 1) * (rewards_S - self.beta * kl_S)
        weight_S = liked_S * self.desirable_weight + (1 - liked_S) * self.undesirable_weight
        loss = (weight_S * torch.sigmoid(-margin_S)).sum()
        ones_S = torch.ones_like(kl_S)
        metrics = {"rewards/accuracies": weighted(margin_S > 0, ones_S)}
        if self.loss_type == "kto":
            metrics["kl"] = weighted(kl_S, ones_S)
        for name, of_S in (("chosen", liked_S), ("rejected", 1 - liked_S)):
            metrics[f"rewards/{name}"] = weighted(rewards_S, of_S)
            metrics[f"logps/{name}"] = weighted(logps_S, of_S)
            metrics[f"logits/{name}"] = weighted(stats.logits_mean, batch.trained * of_S[batch.segment_ids])
        return settle(LossSum({"sequences": loss}, metrics), batch)
