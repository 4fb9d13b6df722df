"""Advantages, against numbers worked out elsewhere and against formulas written out one answer at a time."""

import math
import statistics

import pytest
import torch
from parity_batches import assert_same, make_batch

from swift.batch import IGNORED, Batch
from swift.objectives.advantages import (
    ESTIMATORS,
    compute_advantages,
    estimate_gae,
    token_rewards,
    whiten,
)

NAN = math.nan
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
REWARDS = torch.tensor(
    [
        [1.0, 0.2],
        [0.0, NAN],
        [1.0, 0.7],
        [NAN, 0.1],
        [NAN, 0.4],
        [NAN, 0.9],
        [0.0, 0.5],
        [0.0, 0.5],
        [0.0, 0.5],
    ]
)
WEIGHTS = torch.tensor([2.0, 0.5])


def summed() -> list[float]:
    rows = REWARDS.double().tolist()
    return [sum(w * r for w, r in zip((2.0, 0.5), row, strict=True) if not math.isnan(r)) for row in rows]


def test_the_golden_numbers_of_one_group():
    rewards = torch.tensor([[3.0], [6.0], [2.0], [1.0]])
    found = compute_advantages(rewards, torch.zeros(4, dtype=torch.int64), weights=torch.ones(1))
    assert found.advantages.tolist() == pytest.approx([0.0, 1.3886659, -0.4628887, -0.9257773], abs=1e-7)
    assert found.rewards.tolist() == [3.0, 6.0, 2.0, 1.0] and found.frac_reward_zero_std == 0.0
    assert found.std.tolist() == pytest.approx([statistics.stdev([3, 6, 2, 1])])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_estimators_are_their_formulas(estimator, scale):
    penalty = torch.arange(9.0) / 10
    found = compute_advantages(
        REWARDS, GROUPS, weights=WEIGHTS, estimator=estimator, scale=scale, penalty_N=penalty
    )
    rewards = [r - p for r, p in zip(summed(), penalty.double().tolist(), strict=True)]
    groups = [rewards[i : i + 3] for i in (0, 3, 6)]
    # The mean of the others, not of all: that is all that tells rloo from grpo.
    plain = [r - statistics.mean(g[:i] + g[i + 1 :] if estimator == "rloo" else g)
             for g in groups for i, r in enumerate(g)]  # fmt: skip
    measured = plain if estimator == "reinforce_plus_plus" else rewards
    deviations = {
        "group": [statistics.stdev(measured[i - i % 3 : i - i % 3 + 3]) + 1e-4 for i in range(9)],
        "batch": [statistics.stdev(measured) + 1e-4] * 9,
        "none": [1.0] * 9,
    }[scale]
    expected = [a / d for a, d in zip(plain, deviations, strict=True)]
    assert found.advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_gdpo_normalises_each_function_before_it_adds_them():
    found = compute_advantages(REWARDS, GROUPS, weights=WEIGHTS, scale="gdpo")
    totals = [0.0] * 9
    for column, weight in zip(REWARDS.double().T.tolist(), (2.0, 0.5), strict=True):
        for start in (0, 3, 6):
            there = [i for i in range(start, start + 3) if not math.isnan(column[i])]
            values = [column[i] for i in there]
            for i in there:
                totals[i] += (
                    weight * (column[i] - statistics.mean(values)) / (statistics.stdev(values) + 1e-8)
                )
    mean, deviation = statistics.mean(totals), statistics.stdev(totals) + 1e-8
    assert found.advantages.tolist() == pytest.approx([(t - mean) / deviation for t in totals], abs=1e-9)


def test_what_is_logged_of_rewards():
    found = compute_advantages(REWARDS, GROUPS, weights=WEIGHTS)
    assert found.frac_reward_zero_std == pytest.approx(1 / 3)
    assert found.rewards.tolist() == pytest.approx(summed())
    first, second = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.2, 0.7, 0.1, 0.4, 0.9, 0.5, 0.5, 0.5]
    assert found.function_mean.tolist() == pytest.approx([statistics.mean(first), statistics.mean(second)])
    assert found.function_std.tolist() == pytest.approx([statistics.stdev(first), statistics.stdev(second)])


def test_an_answer_that_nobody_judged_moves_nobody():
    rewards = torch.tensor([[1.0], [NAN], [0.0], [NAN], [NAN]])
    groups = torch.tensor([0, 0, 0, 1, 1])
    for estimator in ESTIMATORS:
        found = compute_advantages(rewards, groups, weights=torch.ones(1), estimator=estimator, scale="none")
        half = 1.0 if estimator == "rloo" else 0.5
        assert found.advantages.tolist() == [half, 0.0, -half, 0.0, 0.0]
    assert found.rewards.isnan().tolist() == [False, True, False, True, True]
    lone = compute_advantages(torch.tensor([[2.0]]), torch.tensor([0]), weights=torch.ones(1))
    assert lone.advantages.tolist() == [0.0] and lone.std.tolist() == [0.0]


def gae_batch() -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Three answers; the second has a turn of somebody else's in it, the third trains nothing."""
    batch = make_batch([6, 9, 4])
    batch.labels[9:11] = IGNORED
    batch.labels[15:] = IGNORED
    generator = torch.Generator().manual_seed(5)
    rewards, values = torch.randn(2, 19, generator=generator, dtype=torch.float64)
    return batch, rewards, values


def test_gae_is_the_sum_of_discounted_errors():
    batch, rewards, values = gae_batch()
    advantages, returns = estimate_gae(rewards, values, batch, gamma=0.9, lam=0.8)
    expected = torch.zeros(19, dtype=torch.float64)
    for s in range(3):
        places = [int(t) for t in (batch.trained & (batch.segment_ids == s)).nonzero()]
        following = [*(float(values[t]) for t in places[1:]), 0.0][: len(places)]
        errors = [
            float(rewards[t]) + 0.9 * after - float(values[t])
            for t, after in zip(places, following, strict=True)
        ]
        for i, t in enumerate(places):
            expected[t] = sum((0.9 * 0.8) ** k * error for k, error in enumerate(errors[i:]))
    assert_same(advantages, expected, 1e-12)
    assert_same(returns, expected + values * batch.trained, 1e-12)


def test_undiscounted_returns_are_the_rewards_to_come():
    batch, rewards, values = gae_batch()
    _, returns = estimate_gae(rewards, values, batch, gamma=1.0, lam=1.0)
    mine = batch.trained & (batch.segment_ids == 1)
    assert_same(returns[mine], rewards[mine].flip(0).cumsum(0).flip(0), 1e-12)


def test_the_score_is_paid_at_the_last_trained_token():
    batch, distance, _ = gae_batch()
    scores = torch.tensor([2.0, -1.0, 7.0])
    found = token_rewards(scores, distance, batch, kl_coef=0.1)
    expected = -0.1 * distance * batch.trained
    for s in (0, 1):  # the third has no token to pay at
        expected[(batch.trained & (batch.segment_ids == s)).nonzero()[-1]] += scores[s].double()
    assert_same(found, expected, 1e-12)


def test_whitened_values_deviate_by_one():
    _, values, _ = gae_batch()
    mean, deviation = statistics.mean(values.tolist()), statistics.stdev(values.tolist())
    assert_same(whiten(values), (values - mean) / math.sqrt(deviation**2 + 1e-8), 1e-12)
    assert_same(whiten(values, shift_mean=False) - mean, whiten(values), 1e-12)
