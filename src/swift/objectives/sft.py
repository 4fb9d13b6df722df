"""Supervised fine-tuning: weighted cross entropy over the trained tokens."""

from dataclasses import dataclass
from typing import ClassVar

from swift.batch import Batch
from swift.objectives.types import LossSum, TokenStats


@dataclass(frozen=True)
class Sft:
    """Next-token cross entropy, each token times its `loss_scale`, averaged over the count of trained tokens.

    The denominator is the plain count, not the sum of the weights: a weight of 2 doubles a token's pull and
    changes nobody else's. Logged `loss` is the same quantity, so a curve means the same with any layout.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "correct"})
    couples_rows: ClassVar[bool] = False

    def units(self, batch: Batch) -> dict[str, int]:
        return {"tokens": int(batch.trained.sum())}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.logps is not None and stats.correct is not None, "Sft needs logps and correct"
        trained_T = batch.trained
        nll_T = -stats.logps * trained_T
        if "loss_scale" in batch.token:
            nll_T = nll_T * batch.token["loss_scale"]
        return LossSum({"tokens": nll_T.sum()}, {"token_acc": (stats.correct.sum(), trained_T.sum())})
