"""What an answer will be worth, foreseen at every token: PPO's value model.

Columns: token["returns"] [T] and token["old_values"] [T], what the model foresaw when it answered.
Not here: returns (advantages.py).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from swift.batch import Batch
from swift.objectives.reduce import column, settle, weighted
from swift.objectives.types import LossSum, Objective, TokenStats


@dataclass(frozen=True)
class Value(Objective):
    """Half the squared error, the larger of that of the value and of the value kept near the old one.

    Averaged over the trained tokens of the step, times `vf_coef`. Source: the clipped value loss of OpenAI's
    baselines, in words in arXiv:2005.12729 section 2.
    """

    cliprange_value: float = 0.2
    vf_coef: float = 0.1

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    def units(self, batch: Batch) -> dict[str, int]:
        return {"tokens": int(batch.trained.sum())}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        values_T = stats.values
        assert values_T is not None, "Value needs values"
        returns_T, old_T = (column(batch, name, values_T.detach()) for name in ("returns", "old_values"))
        near_T = values_T.clamp(old_T - self.cliprange_value, old_T + self.cliprange_value)
        free_T, kept_T = (values_T - returns_T).square(), (near_T - returns_T).square()
        loss_T = 0.5 * torch.maximum(free_T, kept_T) * batch.trained
        metrics = {
            "value/loss": weighted(loss_T, batch.trained),
            "value/mean": weighted(values_T, batch.trained),
            "value/clip_ratio": weighted(kept_T > free_T, batch.trained),
        }
        return settle(LossSum({"tokens": self.vf_coef * loss_T.sum()}, metrics), batch)
