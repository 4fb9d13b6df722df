"""What an answer was worth beyond what was to be expected: rewards to advantages, in float64.

All functions see the answers or tokens of a whole step, of all ranks. Not here: rewards, losses.
Shapes: N = answers, F = reward functions, G = groups (answers to one prompt), T = tokens, S = segments, n = a
part of T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swift.batch import Batch
from swift.objectives.reduce import segment_sum

EPSILON = 1e-4  # beside deviations of rewards
SMALL = 1e-8  # beside deviations of each function's rewards (GDPO), and of advantages that are whitened
ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus")
SCALES = ("group", "batch", "none", "gdpo")


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages and what is logged of rewards. NaN where nothing was there to be averaged."""

    advantages: Tensor  # [N]
    rewards: Tensor  # [N] weighted sums; NaN for answers that no function judged
    std: Tensor  # [G] of the rewards of each group, 0 for groups of one
    frac_reward_zero_std: float  # share of groups with equal rewards, which teach nothing
    function_mean: Tensor  # [F]
    function_std: Tensor  # [F]


def group_moments(values_N: Tensor, groups_N: Tensor) -> tuple[Tensor, Tensor]:
    """[G] means and deviations (ddof 1) of the values that are not NaN. One alone deviates by 0."""
    is_there_N, count = ~values_N.isnan(), int(groups_N.max()) + 1

    def total(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(count).index_add(0, groups_N, torch.where(is_there_N, x_N, 0.0))

    counts_G = total(torch.ones_like(values_N))
    mean_G = total(values_N) / counts_G
    variance_G = total((values_N - mean_G[groups_N]).square()) / (counts_G - 1).clamp(min=1)
    return mean_G, variance_G.sqrt()


def compute_advantages(
    rewards_NF: Tensor,
    groups_N: Tensor,
    *,
    weights: Tensor,
    estimator: str = "grpo",
    scale: str = "group",
    penalty_N: Tensor | None = None,
) -> Advantages:
    """Advantages of answers over those to the same prompt.

    `rewards_NF`: NaN where a function does not judge. `groups_N`: number of the prompt, 0 to G - 1.
    `weights`: [F]. `penalty_N`: taken off the rewards; with --kl_in_reward it is beta times the distance.

    grpo: r - mean (arXiv:2402.03300 section 4.1.2); rloo: r - mean of the others (arXiv:2402.14740 eq. 7);
    reinforce_plus_plus: r - mean, in units of the advantages' own deviation (arXiv:2501.03262).
    `scale`: in units of the deviation of the group or of all, plus 1e-4, or of 1 (arXiv:2503.20783); "gdpo"
    normalises each function within the group, adds them up and normalises the sums (arXiv:2601.05242).

    An answer that no function judged stays out of means and deviations and gets advantage 0.
    """
    rewards_NF, weights = rewards_NF.double(), weights.double()
    assert estimator in ESTIMATORS and scale in SCALES, (estimator, scale)
    rewards_N = (rewards_NF * weights).nansum(1)
    rewards_N = rewards_N.masked_fill(rewards_NF.isnan().all(1), torch.nan)
    if penalty_N is not None:
        rewards_N = rewards_N - penalty_N.double()
    everyone_N = torch.zeros_like(groups_N)
    mean_G, std_G = group_moments(rewards_N, groups_N)
    if scale == "gdpo":
        assert penalty_N is None and estimator == "grpo", "gdpo sees each reward function by itself"
        advantages_N = _each_function(rewards_NF, weights, groups_N).masked_fill(rewards_N.isnan(), torch.nan)
        mean, std = group_moments(advantages_N, everyone_N)
        advantages_N = (advantages_N - mean) / (std + SMALL)
    else:
        advantages_N = rewards_N - mean_G[groups_N]
        if estimator == "rloo":
            counts_N = torch.bincount(groups_N, ~rewards_N.isnan())[groups_N]
            advantages_N = advantages_N * counts_N / (counts_N - 1).clamp(min=1)
        if scale != "none":
            measured_N = advantages_N if estimator == "reinforce_plus_plus" else rewards_N
            within_N = groups_N if scale == "group" else everyone_N
            advantages_N = advantages_N / (group_moments(measured_N, within_N)[1] + EPSILON)[within_N]
    moments = [group_moments(column_N, everyone_N) for column_N in rewards_NF.unbind(1)]
    return Advantages(
        advantages_N.nan_to_num(nan=0.0),
        rewards_N,
        std_G,
        float((std_G <= SMALL).double().mean()),
        torch.cat([mean for mean, _ in moments]),
        torch.cat([std for _, std in moments]),
    )


def _each_function(rewards_NF: Tensor, weights: Tensor, groups_N: Tensor) -> Tensor:
    """[N] weighted sum of every function's rewards, each in units of its own deviation in the group."""
    total_N = torch.zeros_like(rewards_NF[:, 0])
    for column_N, weight in zip(rewards_NF.unbind(1), weights, strict=True):
        mean_G, std_G = group_moments(column_N, groups_N)
        normal_N = (column_N - mean_G[groups_N]) / (std_G[groups_N] + SMALL)
        total_N = total_N + weight * normal_N.nan_to_num(nan=0.0)
    return total_N


def token_rewards(scores_S: Tensor, distance_T: Tensor, batch: Batch, *, kl_coef: float) -> Tensor:
    """[T] PPO's rewards: minus the pull at each trained token, and the score at an answer's last one.

    `distance_T` is log policy - log reference. Source: arXiv:1909.08593 eq. 2, token by token.
    """
    positions_T = torch.arange(batch.num_tokens, device=distance_T.device)
    last_S = torch.full_like(batch.segment_lengths(), -1).scatter_reduce(
        0, batch.segment_ids, torch.where(batch.trained, positions_T, -1), "amax"
    )
    rewards_T = -kl_coef * distance_T.double() * batch.trained
    has_S = last_S >= 0
    return rewards_T.index_add(0, last_S.clamp(min=0), scores_S.double() * has_S)


def estimate_gae(
    rewards_T: Tensor, values_T: Tensor, batch: Batch, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """([T] advantages, [T] returns) of trained tokens, 0 elsewhere. Source: arXiv:1506.02438 eq. 16.

    A token's successor is the next trained one of its segment; behind the last one the value is 0.
    """
    index_n = batch.trained.nonzero().squeeze(1)
    segment_n, counts_S = batch.segment_ids[index_n], segment_sum(batch.trained.long(), batch)
    place_n = torch.arange(len(index_n), device=index_n.device) - (counts_S.cumsum(0) - counts_S)[segment_n]
    longest = int(counts_S.max())
    table = rewards_T.new_zeros((2, longest + 1, batch.num_segments), dtype=torch.float64)
    table[:, place_n, segment_n] = torch.stack((rewards_T[index_n], values_T[index_n])).double()
    rewards, values = table
    advantages = torch.zeros_like(values)
    for i in reversed(range(longest)):  # rows that have ended are zeros
        error = rewards[i] + gamma * values[i + 1] - values[i]
        advantages[i] = error + gamma * lam * advantages[i + 1]
    found_n = advantages[place_n, segment_n]
    advantages_T = torch.zeros_like(rewards_T, dtype=torch.float64).index_copy(0, index_n, found_n)
    return advantages_T, advantages_T + values_T.double() * batch.trained


def whiten(values_n: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values in units of their deviation (ddof 1), around 0 or, without `shift_mean`, around their mean."""
    mean_n, variance = values_n.mean(), values_n.var()
    return (values_n - mean_n) * (variance + SMALL).rsqrt() + (0.0 if shift_mean else mean_n)
