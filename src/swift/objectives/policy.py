"""Policy gradients from given advantages: the GRPO family.

A loss is a ratio level (LEVELS), a rule for tokens and a unit that it is averaged over (LOSSES). Columns, [T]
each: token["advantages"]; token["old_logps"] (absent: the policy has not moved since it answered);
token["ref_logps"] with a `beta`; token["rollout_logps"] where the sampler told them; token["entropy_kept"], 0
for tokens that teach nothing. Rows that teach nothing at all may be left out (`drop_idle`).
Not here: advantages (advantages.py), answers, which tokens are trained (labels).
Shapes: T = tokens, S = segments, each one answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from swift.batch import Batch, join
from swift.objectives.reduce import column, extreme, is_filler, segment_sum, settle, trained_counts, weighted
from swift.objectives.types import LossSum, Objective, TokenStats

FARTHEST = 20.0  # log-ratios beyond it would overflow before anything clips them
LARGEST_KL = 10.0  # of one token
IDLE = "idle"  # segment column [S, 2]: answers, and trained tokens of them, that were left out beside a row


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyRule:
    """What the flags of these names ask for."""

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None  # none = epsilon; for cispo the largest weight itself
    delta: float | None = None  # bound of the ratio where a negative advantage leaves it free
    beta: float = 0.04
    kl_in_reward: bool = False  # the advantages hold the pull of beta: the distance is measured alone
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    max_completion_length: int = 512
    rollout_importance_sampling_mode: str | None = None
    rollout_importance_sampling_threshold: float = 2.0
    off_policy_sequence_mask_delta: float | None = None
    log_entropy: bool = False
    has_rollout_logps: bool = False  # every batch has them: ranks log the same names whatever rows they have

    @property
    def highest(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


@dataclass(frozen=True, slots=True)
class Ratios:
    """The policy against the one that answered, for every token."""

    ratio_T: Tensor
    advantage_T: Tensor
    logps_T: Tensor


def clip(at: Ratios, rule: PolicyRule) -> Tensor:
    """PPO, arXiv:1707.06347 eq. 7; two bounds as in DAPO, arXiv:2503.14476; `delta`: arXiv:2505.07291."""
    bounded_T = at.ratio_T.clamp(1 - rule.epsilon, 1 + rule.highest)
    free_T = at.ratio_T if rule.delta is None else at.ratio_T.clamp(max=rule.delta)
    return -torch.minimum(free_T * at.advantage_T, bounded_T * at.advantage_T)


def cispo(at: Ratios, rule: PolicyRule) -> Tensor:
    """Bounded weights instead of a bounded objective, so every token teaches: arXiv:2506.13585 eq. 4 and 5.

    The bound above is `epsilon_high` itself, not 1 more (as in ms-swift and TRL), and there is none below: so
    the paper trains.
    """
    return -at.ratio_T.detach().clamp(max=rule.highest) * at.advantage_T * at.logps_T


def sapo(at: Ratios, rule: PolicyRule) -> Tensor:
    """A soft gate in place of the clip: arXiv:2511.20347."""
    taus = at.ratio_T.new_tensor((rule.tau_neg, rule.tau_pos))
    tau_T = taus[(at.advantage_T > 0).long()]
    return -torch.sigmoid(tau_T * (at.ratio_T - 1)) * 4 / tau_T * at.advantage_T


# loss_type -> rule for tokens, unit. "sequences": mean over an answer's tokens, then over answers; "tokens":
# over all trained tokens of the step (arXiv:2503.14476); "budget": over as many as the answers might have
# had (arXiv:2503.20783).
LOSSES: dict[str, tuple[Callable[[Ratios, PolicyRule], Tensor], str]] = {
    "grpo": (clip, "sequences"),
    "bnpo": (clip, "tokens"),
    "dapo": (clip, "tokens"),
    "dr_grpo": (clip, "budget"),
    "cispo": (cispo, "tokens"),
    "sapo": (sapo, "sequences"),
}
CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo")


def _of_sequence(log_ratio_T: Tensor, _logps_T: Tensor, batch: Batch) -> Tensor:
    """GSPO, arXiv:2507.18071 eq. 7: the geometric mean of an answer's ratios, at each of its tokens."""
    return segment_mean(log_ratio_T, batch)[batch.segment_ids]


def _of_sequence_by_token(log_ratio_T: Tensor, logps_T: Tensor, batch: Batch) -> Tensor:
    """GSPO-token, arXiv:2507.18071 eq. 14: the same value, but each token leads back to itself alone."""
    return segment_mean(log_ratio_T, batch)[batch.segment_ids].detach() + logps_T - logps_T.detach()


LEVELS: dict[str, Callable[[Tensor, Tensor, Batch], Tensor]] = {
    "token": lambda log_ratio_T, *_: log_ratio_T,
    "sequence": _of_sequence,
    "sequence_token": _of_sequence_by_token,
}


def segment_mean(values_T: Tensor, batch: Batch) -> Tensor:
    """[S] means over trained tokens of values that are 0 elsewhere; 0 for segments without any."""
    return segment_sum(values_T, batch) / trained_counts(batch, values_T).clamp(min=1)


def k3(policy_T: Tensor, reference_T: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at a token that the policy drew, 0 to 10: Schulman 2020, k3."""
    lead_T = (reference_T - policy_T).clamp(-FARTHEST, FARTHEST)
    return (lead_T.exp() - lead_T - 1).clamp(max=LARGEST_KL)


def rollout_weights(log_ratio_T: Tensor, batch: Batch, *, mode: str, threshold: float) -> Tensor:
    """[T] importance weights of the trainer's policy against the sampler's, bounded above.

    token_truncate caps a token's ratio (Ionides 2008), token_mask drops tokens above the threshold;
    sequence_truncate gives all tokens the capped geometric mean of their answer; sequence_mask keeps tokens'
    ratios and drops answers whose mean is above.
    """
    ratio_T = log_ratio_T.exp()
    level, _, action = mode.partition("_")
    level_T = ratio_T if level == "token" else segment_mean(log_ratio_T, batch).exp()[batch.segment_ids]
    return level_T.clamp(max=threshold) if action == "truncate" else ratio_T * (level_T <= threshold)


def entropy_threshold(entropy_N: Tensor, share: float) -> float:
    """What the `share` of tokens with the most entropy have at least, 0 of none. Source: arXiv:2506.01939."""
    if not len(entropy_N):
        return 0.0
    return float(entropy_N.sort(descending=True).values[max(int(len(entropy_N) * share) - 1, 0)])


@dataclass(frozen=True)
class Policy(Objective):
    """The loss of `rule`, over the units of the whole step.

    All losses are sums over answers or tokens, so no cut into micro-batches changes them. "bnpo" is therefore
    the same as "dapo": elsewhere it is a mean over a device's micro-batch, and an answer weighs by what it
    happens to share that with. Corrections and `entropy_kept` weigh the policy's part and neither the pull to
    the reference (arXiv:2512.02556 eq. 9) nor a denominator: what they drop adds 0. Rows without a trained
    token count as answers.
    """

    rule: PolicyRule = field(default_factory=PolicyRule)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logps", "entropy"} if self.rule.log_entropy else {"logps"})

    def units(self, batch: Batch) -> dict[str, int]:
        unit = LOSSES[self.rule.loss_type][1]
        idle, idle_tokens = batch.segment[IDLE].sum(0).tolist() if IDLE in batch.segment else (0, 0)
        if unit == "tokens":
            return {unit: int(batch.trained.sum()) + idle_tokens}
        answers = 0 if is_filler(batch) else batch.num_segments + idle
        return {unit: answers * (self.rule.max_completion_length if unit == "budget" else 1)}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        logps_T, rule = stats.logps, self.rule
        assert logps_T is not None, "Policy needs logps"
        token_rule, unit = LOSSES[rule.loss_type]
        advantage_T = column(batch, "advantages", logps_T)
        old_T = column(batch, "old_logps", logps_T) if "old_logps" in batch.token else logps_T.detach()
        log_ratio_T = ((logps_T - old_T) * batch.trained).clamp(-FARTHEST, FARTHEST)
        level_T = LEVELS[rule.importance_sampling_level](log_ratio_T, logps_T, batch)
        at = Ratios(level_T.exp(), advantage_T, logps_T)
        loss_T = token_rule(at, rule) * self._weights(logps_T.detach(), old_T, advantage_T, batch)
        metrics = self._clip_metrics(at, batch)
        if rule.beta:
            kl_T = k3(logps_T, column(batch, "ref_logps", logps_T)) * batch.trained
            metrics["kl"] = weighted(kl_T, batch.trained)
            loss_T = loss_T + (0.0 if rule.kl_in_reward else rule.beta) * kl_T
        if rule.has_rollout_logps:
            metrics |= rollout_metrics(old_T - column(batch, "rollout_logps", old_T), batch)
        if rule.log_entropy:
            assert stats.entropy is not None
            metrics |= entropy_metrics(stats.entropy, batch)
        loss_T = loss_T * batch.trained
        term = segment_mean(loss_T, batch).sum() if unit == "sequences" else loss_T.sum()
        return settle(LossSum({unit: term}, metrics), batch)

    def _weights(self, logps_T: Tensor, old_T: Tensor, advantage_T: Tensor, batch: Batch) -> Tensor:
        """[T] what the policy's part of each token's loss is multiplied by."""
        rule, weight_T = self.rule, torch.ones_like(logps_T)
        sampler_T = column(batch, "rollout_logps", logps_T) if rule.has_rollout_logps else old_T
        if rule.rollout_importance_sampling_mode is not None and rule.has_rollout_logps:
            gap_T = ((old_T - sampler_T) * batch.trained).clamp(-FARTHEST, FARTHEST)
            threshold = rule.rollout_importance_sampling_threshold
            mode = rule.rollout_importance_sampling_mode
            weight_T = rollout_weights(gap_T, batch, mode=mode, threshold=threshold)
        if rule.off_policy_sequence_mask_delta is not None:
            # Bad answers that the policy has already left behind teach nothing more: arXiv:2512.02556 eq. 9.
            moved_S = segment_mean((sampler_T - logps_T) * batch.trained, batch)
            is_near_T = (moved_S <= rule.off_policy_sequence_mask_delta)[batch.segment_ids]
            weight_T = weight_T * ((advantage_T >= 0) | is_near_T)
        if "entropy_kept" in batch.token:
            weight_T = weight_T * column(batch, "entropy_kept", logps_T)
        return weight_T

    def _clip_metrics(self, at: Ratios, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Shares of tokens, or of answers where these have one ratio, whose gradient the bounds cut off."""
        rule, ratio_T = self.rule, at.ratio_T.detach()
        has_S = trained_counts(batch, ratio_T) > 0

        def by_answer(flags_T: Tensor) -> Tensor:
            return segment_mean(flags_T.to(ratio_T.dtype) * batch.trained, batch)

        def share(flags_T: Tensor) -> tuple[Tensor, Tensor]:
            if rule.importance_sampling_level == "sequence":
                return weighted(by_answer(flags_T), has_S)
            return weighted(flags_T.to(ratio_T.dtype), batch.trained)

        if rule.loss_type == "cispo":
            return {"cispo_clip_ratio": share((ratio_T > rule.highest) & (at.advantage_T > 0))}
        if rule.loss_type not in CLIPPED:
            return {}
        low_T = (ratio_T < 1 - rule.epsilon) & (at.advantage_T < 0)
        high_T = (ratio_T > 1 + rule.highest) & (at.advantage_T > 0)
        return {
            "clip_ratio/low_mean": share(low_T),
            "clip_ratio/low_min": extreme(by_answer(low_T), has_S, torch.amin),
            "clip_ratio/high_mean": share(high_T),
            "clip_ratio/high_max": extreme(by_answer(high_T), has_S, torch.amax),
            "clip_ratio/region_mean": share(low_T | high_T),
        }


def drop_idle(part: Sequence[Batch], *, rows_each: int, is_pulled: bool) -> list[Batch]:
    """One optimizer step's batches without the rows whose gradient is 0 whatever the model says.

    A row teaches where a trained token has an advantage, or, with a pull to the reference, where any token is
    trained. The others are counted all the same (`Policy.units`), so that the loss and its gradient stay what
    they were; metrics of tokens are of the rows that are left. One row stays where none teaches.
    """
    if not part:
        return []
    whole = join(part)
    teaches_T = whole.trained & ((whole.token["advantages"] != 0) | is_pulled)
    teaches_S = segment_sum(teaches_T.long(), whole) > 0
    teaches_S[0] |= not teaches_S.any()
    if teaches_S.all():
        return list(part)
    batches = [whole.take(rows) for rows in teaches_S.nonzero().squeeze(1).split(rows_each)]
    idle_S2 = torch.zeros(batches[0].num_segments, 2, dtype=torch.int64)
    idle_S2[0, 0] = (~teaches_S).sum()
    idle_S2[0, 1] = (whole.trained & ~teaches_S[whole.segment_ids]).sum()
    return [replace(batches[0], segment={**batches[0].segment, IDLE: idle_S2}), *batches[1:]]


def entropy_metrics(entropy_T: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean over tokens; the lowest and highest mean of an answer. In nats."""
    entropy_T = entropy_T.detach() * batch.trained
    has_S, mean_S = trained_counts(batch, entropy_T) > 0, segment_mean(entropy_T, batch)
    return {
        "entropy/mean": weighted(entropy_T, batch.trained),
        "entropy/min": extreme(mean_S, has_S, torch.amin),
        "entropy/max": extreme(mean_S, has_S, torch.amax),
    }


def rollout_metrics(gap_T: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """How far the trainer's log-probabilities are from the sampler's; `gap_T` is the first less the second.

    `rollout/kl` estimates KL(sampler || trainer). `rollout/ess` is the effective sample size of an answer's
    tokens under importance weights (Kong 1992) as a share of their number, averaged over answers: 1 = equal.
    """
    gap_T = (gap_T.detach() * batch.trained).clamp(-FARTHEST, FARTHEST)
    ratio_T = gap_T.exp() * batch.trained
    counts_S = trained_counts(batch, gap_T)
    size_S = segment_sum(ratio_T, batch).square() / segment_sum(ratio_T.square(), batch).clamp(min=1e-30)
    distance_T = gap_T.abs()
    return {
        "rollout/logp_diff_mean": weighted(distance_T, batch.trained),
        "rollout/logp_diff_max": extreme(distance_T, batch.trained, torch.amax),
        "rollout/kl": weighted(k3(-gap_T, torch.zeros_like(gap_T)), batch.trained),
        "rollout/ess": weighted(size_S / counts_S.clamp(min=1), counts_S > 0),
    }
