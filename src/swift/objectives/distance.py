"""How far the policy has gone from the reference on given answers. A measurement, never a loss."""

from dataclasses import dataclass
from typing import ClassVar

from swift.batch import Batch
from swift.objectives.reduce import column, settle
from swift.objectives.types import LossSum, Objective, TokenStats


@dataclass(frozen=True)
class Distance(Objective):
    """Metric `kl`: log policy - log reference, summed over each answer and averaged over answers.

    Reads token["ref_logps"] [T]. Its mean over answers of the policy estimates the KL divergence.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logps"})

    def units(self, _: Batch) -> dict[str, int]:
        return {}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.logps is not None, "Distance needs logps"
        ratio_T = (stats.logps - column(batch, "ref_logps", stats.logps)) * batch.trained
        result = LossSum({}, {"kl": (ratio_T.sum(), ratio_T.new_full((), batch.num_segments))})
        return settle(result, batch)
