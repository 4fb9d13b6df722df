"""Preference objectives: DPO and its relatives, CPO, SimPO, ORPO.

Owns: the losses of a pair of answers, alone or mixed. Segments 2p and 2p + 1 are the chosen and the rejected
answer of pair p; token["ref_logps"] [T] is what the reference model says about the same labels.
Not here: how the reference is run, statistics over many batches (columns of the batch), means (engines).

Shapes: T = tokens, S = segments, P = pairs. Everything [P, 2] has the chosen answer in column 0.
The methods without a reference model (CPO, SimPO, ORPO) are rules with `reference_free` and a weight of the
chosen answer's likelihood. docs/papers.md maps every loss to its paper.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.batch import Batch
from swift.objectives.reduce import (
    column,
    mean_of,
    pair_up,
    segment_sum,
    settle,
    trained_counts,
    weighted,
)
from swift.objectives.types import LossSum, Objective, TokenStats

MAX_EXPONENT = 40.0  # e^40 squared is finite in float32
CLOSEST_TO_CERTAIN = -1e-7  # largest mean log-probability with finite odds in float32
AVERAGED = frozenset({"ipo", "simpo", "orpo"})  # losses of log-probabilities a token, not a sequence
RANKED = frozenset({"aot", "aot_pair"})  # losses that compare sorted lists


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the models say about the pairs of a batch."""

    logps: Tensor  # [P, 2] of the policy, natural log, summed over the trained tokens
    ref_logps: Tensor  # [P, 2] of the reference; zeros without one
    lengths: Tensor  # [P, 2] trained tokens, at least 1
    scores: Tensor  # [P, 2] f'(policy / reference); for reverse KL the log-ratio
    columns: dict[str, Tensor]  # [P, 2] statistics over more than this batch

    @property
    def ratios(self) -> Tensor:
        """[P, 2] log(policy / reference)."""
        return self.logps - self.ref_logps

    @property
    def delta(self) -> Tensor:
        """[P] by how much more the policy has moved towards the chosen answer."""
        return self.scores[:, 0] - self.scores[:, 1]

    @property
    def mean_delta(self) -> Tensor:
        """[P] the same with each answer divided by its number of tokens."""
        means = self.scores / self.lengths
        return means[:, 0] - means[:, 1]

    def ranked_values(self, name: str) -> tuple[Tensor, Tensor]:
        """Two [P] lists whose sorted forms the loss `name` of RANKED compares."""
        if name == "aot_pair":
            return self.ratios[:, 0], self.ratios[:, 1]
        return self.logps[:, 0] - self.logps[:, 1], self.ref_logps[:, 0] - self.ref_logps[:, 1]


@dataclass(frozen=True)
class Preference(Objective):
    """Weighted sum of pair losses, plus the chosen answers' negative log-likelihood.

    Terms: `pairs`, and `tokens` (chosen ones) where `rpo_alpha` or the loss "sft" asks for likelihood.
    The fields are those of `RlhfConfig`; `beta` is positive. Sources: the rules below.
    """

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    ld_alpha: float = 1.0
    simpo_gamma: float = 1.0
    discopop_tau: float = 0.05
    reference_free: bool = False
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "logits_mean"})
    couples_rows: ClassVar[bool] = False  # train/scoring.py fills the columns of RANKED

    @property
    def likelihood_weight(self) -> float:
        """Weight of the chosen answers' negative log-likelihood a token."""
        mixed = zip(self.loss_type, self.loss_weights, strict=True)
        return self.rpo_alpha + sum(weight for name, weight in mixed if name == "sft")

    def units(self, batch: Batch) -> dict[str, int]:
        units = {"pairs": batch.num_segments // 2}
        if self.likelihood_weight:
            units["tokens"] = int(chosen_tokens(batch).sum())
        return units

    def score(self, stats: TokenStats, batch: Batch) -> Pairs:
        """The pairs of a batch as the rules see them; statistics over several batches start from it."""
        assert stats.logps is not None, "Preference needs logps"
        trained_T = batch.trained.to(stats.logps.dtype)
        if self.ld_alpha != 1.0:
            trained_T = self._damp_tails(trained_T, batch)
        logps = pair_up(segment_sum(stats.logps * trained_T, batch))
        ref_logps = torch.zeros_like(logps)
        if not self.reference_free:
            ref_T = column(batch, "ref_logps", stats.logps.detach())
            ref_logps = pair_up(segment_sum(ref_T * trained_T, batch))
        lengths = pair_up(trained_counts(batch, stats.logps)).clamp(min=1)
        names = batch.segment.keys() & {"bco_delta", *(f"{name}_partner" for name in RANKED)}
        columns = {name: pair_up(batch.segment[name].to(logps.dtype)) for name in names}
        return Pairs(logps, ref_logps, lengths, self._scores(logps - ref_logps), columns)

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.logps is not None and stats.logits_mean is not None, (
            "Preference needs logps, logits_mean"
        )
        pairs = self.score(stats, batch)
        terms = {"pairs": stats.logps.sum() * 0.0}  # leads back to the model without pairs too
        mixed = zip(self.loss_type, self.loss_weights, strict=True)
        for name, weight in mixed if len(pairs.logps) else ():
            if name != "sft":
                terms["pairs"] = terms["pairs"] + weight * RULES[name](pairs, self).sum()
        metrics = self._metrics(pairs, stats, batch)
        if self.likelihood_weight:
            chosen_T = chosen_tokens(batch)
            nll = -(stats.logps * chosen_T).sum()
            terms["tokens"] = self.likelihood_weight * nll
            metrics["nll_loss"] = (nll.detach(), chosen_T.sum())
        return settle(LossSum(terms, metrics), batch)

    def _scores(self, ratios: Tensor) -> Tensor:
        """[P, 2] f'(u) of u = policy / reference, up to a constant. Source: arXiv:2309.16240, table 1."""
        if self.f_divergence_type == "js_divergence":
            return F.logsigmoid(ratios) + math.log(2)
        if self.f_divergence_type == "alpha_divergence":
            alpha = self.f_alpha_divergence_coef
            return (1 - torch.exp((-alpha * ratios).clamp(max=MAX_EXPONENT))) / alpha
        return ratios

    def _damp_tails(self, trained_T: Tensor, batch: Batch) -> Tensor:
        """[T]: trained tokens; behind the shorter answer's length they weigh `ld_alpha`. arXiv:2409.06411."""
        counts_S = trained_counts(batch, trained_T)
        paired = pair_up(counts_S)
        shared_S = counts_S.clone()
        shared_S[: paired.numel()] = paired.min(dim=1, keepdim=True).values.expand_as(paired).reshape(-1)
        before_S = counts_S.cumsum(0) - counts_S
        rank_T = trained_T.cumsum(0) - before_S[batch.segment_ids]
        return torch.where(rank_T <= shared_S[batch.segment_ids], trained_T, trained_T * self.ld_alpha)

    def _metrics(self, pairs: Pairs, stats: TokenStats, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        per = pairs.lengths if AVERAGED.issuperset(self.loss_type) else torch.ones_like(pairs.lengths)
        rewards, logps = self.beta * pairs.ratios.detach() / per, pairs.logps / per
        metrics = {
            "rewards/chosen": mean_of(rewards[:, 0]),
            "rewards/rejected": mean_of(rewards[:, 1]),
            "rewards/accuracies": mean_of((rewards[:, 0] > rewards[:, 1]).to(rewards.dtype)),
            "rewards/margins": mean_of(rewards[:, 0] - rewards[:, 1]),
            "logps/chosen": mean_of(logps[:, 0]),
            "logps/rejected": mean_of(logps[:, 1]),
        }
        assert stats.logits_mean is not None
        chosen_T = chosen_tokens(batch)
        metrics["logits/chosen"] = weighted(stats.logits_mean, chosen_T)
        metrics["logits/rejected"] = weighted(stats.logits_mean, batch.trained & ~chosen_T)
        if "orpo" in self.loss_type:
            odds_P = log_odds(pairs)
            metrics["log_odds_chosen"] = mean_of(odds_P)
            metrics["log_odds_ratio"] = mean_of(F.logsigmoid(odds_P))
        return metrics


def chosen_tokens(batch: Batch) -> Tensor:
    """[T] bool: trained tokens of chosen answers."""
    return batch.trained & (batch.segment_ids % 2 == 0)


def match_ranks(values: Tensor, others: Tensor) -> Tensor:
    """[P, 2]: the other list's value of the same rank, for each entry of `values` [P] and of `others` [P].

    Flattened to [S] it is the column `<loss>_partner` of a loss in RANKED: computed over all pairs of an
    optimizer step (from `Pairs.ranked_values` of passes without gradient), it makes value and gradient of
    the loss independent of how the step is cut into micro-batches.
    """
    values, others = values.detach(), others.detach()
    value_order, other_order = values.argsort(), others.argsort()
    partners = torch.empty(values.shape[0], 2, dtype=values.dtype, device=values.device)
    partners[value_order, 0] = others[other_order]
    partners[other_order, 1] = values[value_order]
    return partners


def log_odds(pairs: Pairs) -> Tensor:
    """[P] log of the odds of the chosen over those of the rejected answer, from mean log-probabilities.

    Source: ORPO, arXiv:2403.07691 eq. 4 and 7. Means are kept just below 0, where odds are finite.
    """
    means = (pairs.logps / pairs.lengths).clamp(max=CLOSEST_TO_CERTAIN)
    odds = means - torch.log(-torch.expm1(means))
    return odds[:, 0] - odds[:, 1]


def _logistic(margin_P: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of "chosen wins" when a share `smoothing` of the labels is wrong."""
    return -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)


def _sigmoid(pairs: Pairs, c: Preference) -> Tensor:
    """DPO, arXiv:2305.18290 eq. 7; CPO, arXiv:2401.08417 eq. 3; smoothing: cDPO, Mitchell 2023."""
    return _logistic(c.beta * pairs.delta, c.label_smoothing)


def _robust(pairs: Pairs, c: Preference) -> Tensor:
    """rDPO, arXiv:2403.00409: unbiased when a share `label_smoothing` below one half is flipped."""
    margin_P, epsilon = c.beta * pairs.delta, c.label_smoothing
    clean_P, flipped_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
    return ((1 - epsilon) * clean_P - epsilon * flipped_P) / (1 - 2 * epsilon)


def _hinge(pairs: Pairs, c: Preference) -> Tensor:
    """SLiC, arXiv:2305.10425, over log-ratios as in RSO, arXiv:2309.06657."""
    return torch.relu(1 - c.beta * pairs.delta)


def _ipo(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2310.12036 eq. 17, over means: a sum would let the target shrink with the length."""
    return (pairs.mean_delta - 1 / (2 * c.beta)).square()


def _exo_pair(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2402.00856 eq. 16: reverse KL to the labels; smoothing 0, which would be infinite, is 1e-3."""
    margin_P, epsilon = c.beta * pairs.delta, c.label_smoothing or 1e-3
    win_P, lose_P = F.logsigmoid(margin_P), F.logsigmoid(-margin_P)
    return win_P.exp() * (win_P - math.log1p(-epsilon)) + lose_P.exp() * (lose_P - math.log(epsilon))


def _nca_pair(pairs: Pairs, c: Preference) -> Tensor:
    """NCA, arXiv:2402.05369, for a pair."""
    rewards = c.beta * pairs.ratios
    push_P = F.logsigmoid(-rewards[:, 0]) + F.logsigmoid(-rewards[:, 1])
    return -F.logsigmoid(rewards[:, 0]) - 0.5 * push_P


def _bco_pair(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2404.04656: each answer against the running mean reward, segment["bco_delta"] [S]."""
    shifted = c.beta * pairs.ratios - pairs.columns["bco_delta"]
    return -F.logsigmoid(shifted[:, 0]) - F.logsigmoid(-shifted[:, 1])


def _sppo_hard(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2405.00675 eq. 4.7 with the winner's probability 1."""
    goal = 0.5 / c.beta
    return (pairs.ratios[:, 0] - goal).square() + (pairs.ratios[:, 1] + goal).square()


def _ranked(name: str) -> "Rule":
    def rule(pairs: Pairs, c: Preference) -> Tensor:
        """AOT, arXiv:2406.05882: the i-th smallest of one list against the i-th smallest of the other.

        Without the column `<name>_partner` ranks are those within the batch. A pair's gradient flows
        through its own two values, each against its partner held fixed: summed over all pairs that is the
        gradient of the loss of the sorted lists.
        """
        values_P, others_P = pairs.ranked_values(name)
        partners = pairs.columns.get(f"{name}_partner")
        partners = match_ranks(values_P, others_P) if partners is None else partners
        own_P = _logistic(c.beta * (values_P - partners[:, 0]), c.label_smoothing)
        other_P = _logistic(c.beta * (partners[:, 1] - others_P), c.label_smoothing)
        return own_P + other_P - other_P.detach()

    return rule


def _apo_zero(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2408.06266 eq. 7: chosen up, rejected down."""
    return torch.sigmoid(-c.beta * pairs.ratios[:, 0]) + torch.sigmoid(c.beta * pairs.ratios[:, 1])


def _apo_down(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2408.06266 eq. 8: both down, rejected further."""
    margin_P = c.beta * (pairs.ratios[:, 0] - pairs.ratios[:, 1])
    return torch.sigmoid(c.beta * pairs.ratios[:, 0]) + torch.sigmoid(-margin_P)


def _discopop(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2406.08414 eq. 5: logistic and exponential loss, blended by the margin."""
    margin_P = c.beta * pairs.delta
    blend_P = torch.sigmoid(margin_P / c.discopop_tau)
    return -F.logsigmoid(margin_P) * (1 - blend_P) + torch.exp((-margin_P).clamp(max=MAX_EXPONENT)) * blend_P


def _simpo(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2405.14734 eq. 6: mean log-probabilities, and a margin of at least `simpo_gamma`."""
    return _logistic(c.beta * pairs.mean_delta - c.simpo_gamma, c.label_smoothing)


def _orpo(pairs: Pairs, c: Preference) -> Tensor:
    """arXiv:2403.07691 eq. 6 and 7: the odds-ratio part, whose weight lambda is `beta`."""
    return -c.beta * F.logsigmoid(log_odds(pairs))


Rule = Callable[[Pairs, Preference], Tensor]  # -> [P]
RULES: dict[str, Rule] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _ranked("aot"),
    "aot_pair": _ranked("aot_pair"),
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "simpo": _simpo,
    "orpo": _orpo,
}
