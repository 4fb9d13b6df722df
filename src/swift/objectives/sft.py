"""Supervised fine-tuning: weighted cross entropy over the trained tokens, and its variants."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from swift.batch import Batch
from swift.config.sft import SftConfig
from swift.objectives.reduce import segment_sum
from swift.objectives.router import segment_balance
from swift.objectives.types import LossSum, Objective, TokenStats


@dataclass(frozen=True)
class Sft(Objective):
    """Next-token cross entropy, each token times its `loss_scale`, averaged over the count of trained tokens.

    The denominator is the plain count, not the sum of the weights: a weight of 2 doubles a token's pull and
    changes nobody else's. Logged `loss` is the same quantity, so a curve means the same with any layout.

    `channels` name the values of batch.segment["channel"] (-1 = none). The losses of channels, weighed by
    their tokens, make up the loss of their rows. `experts_per_token` is a fact about the model.
    """

    config: SftConfig = field(default_factory=SftConfig)
    channels: tuple[str, ...] = ()
    experts_per_token: int = 0

    @property
    def needs(self) -> frozenset[str]:
        wanted = {"logps", "correct"}
        if self.config.label_smoothing_factor > 0:
            wanted.add("mean_logps")
        if self.config.router_aux_loss_coef > 0:
            wanted.add("router_logits")
        return frozenset(wanted)

    def units(self, batch: Batch) -> dict[str, int]:
        units = {"tokens": int(batch.trained.sum())}
        if self.config.router_aux_loss_coef:
            units["routed"] = int((batch.segment_lengths() * has_trained(batch)).sum())
        return units

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.correct is not None, "Sft needs logps and correct"
        trained_T = batch.trained
        nll_T = self._token_losses(stats, batch)
        terms, metrics = {"tokens": nll_T.sum()}, {}
        if self.config.acc_strategy == "seq":
            wrong_T = trained_T & ~stats.correct
            has_S, wrong_S = has_trained(batch), segment_sum(wrong_T.long(), batch)
            metrics["seq_acc"] = ((has_S & (wrong_S == 0)).sum(), has_S.sum())
        else:
            metrics["token_acc"] = (stats.correct.sum(), trained_T.sum())
        if self.channels:
            metrics |= self._channel_losses(nll_T.detach(), batch)
        if self.config.router_aux_loss_coef:
            assert stats.router_logits is not None
            balance_S = segment_balance(stats.router_logits, batch, self.experts_per_token)
            tokens_S = batch.segment_lengths() * has_trained(batch)
            balance = (balance_S * tokens_S).sum()
            terms["routed"] = self.config.router_aux_loss_coef * balance
            metrics["aux_loss"] = (balance.detach(), tokens_S.sum())
        return LossSum(terms, metrics)

    def _token_losses(self, stats: TokenStats, batch: Batch) -> Tensor:
        """[T] what each token adds to the loss, 0 where it is not trained.

        Label smoothing as in arXiv:1512.00567 section 7, with the even share over the whole vocabulary.
        """
        assert stats.logps is not None
        nll_T = -stats.logps * batch.trained
        share = self.config.label_smoothing_factor
        if share:
            assert stats.mean_logps is not None
            nll_T = (1 - share) * nll_T - share * stats.mean_logps * batch.trained
        if self.config.enable_dft_loss:
            nll_T = nll_T * stats.logps.detach().exp()
        return nll_T * batch.token["loss_scale"] if "loss_scale" in batch.token else nll_T

    def _channel_losses(self, nll_T: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum and count of every channel, also of those without a row here: all ranks log the same names."""
        count = len(self.channels)
        none_S = batch.segment_ids.new_full((batch.num_segments,), -1)
        channel_S = batch.segment.get("channel", none_S).long() % (count + 1)  # -1, none, is the last place
        channel_T = channel_S[batch.segment_ids]
        zeros = nll_T.new_zeros(count + 1, dtype=torch.float64)
        totals = zeros.index_add(0, channel_T, nll_T.double())
        counts = zeros.index_add(0, channel_T, batch.trained.double())
        return {f"loss_{name}": (totals[i], counts[i]) for i, name in enumerate(self.channels)}


def has_trained(batch: Batch) -> Tensor:
    """[S] bool: the segment has a trained token."""
    return segment_sum(batch.trained.long(), batch) > 0
