"""The GRPO family in float64: values and gradients against TRL's loss, and against formulas of the papers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from parity_batches import (
    assert_same,
    loss_and_gradient,
    make_batch,
    make_logps,
    metric,
    padded,
    select,
    total_loss,
    trl_trainer,
)
from torch import Tensor
from trl import GRPOTrainer

from swift.batch import IGNORED, Batch
from swift.engines.protocol import Sums
from swift.engines.stepping import NOTHING, collect_sums
from swift.objectives.policy import LEVELS, LOSSES, Policy, PolicyRule, entropy_threshold, rollout_weights
from swift.objectives.types import TokenStats

LENGTHS = [6, 9, 12, 4, 7, 5]
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
OPTIONS = {"epsilon": 0.15, "epsilon_high": 0.3, "beta": 0.1, "max_completion_length": 20,
           "tau_pos": 0.75, "tau_neg": 1.5}  # fmt: skip


def noise(batch: Batch, seed: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64) * size) * batch.trained


def policy_batch(*, seed: int = 0, spread: float = 0.4) -> tuple[Batch, Tensor]:
    """Six answers, an advantage each, one of them 0; the policy has moved by `spread` from the old one."""
    batch = make_batch(LENGTHS, seed=seed)
    logps = make_logps(batch, seed=seed + 10)
    advantages_S = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.0, 0.9], dtype=torch.float64)
    old = logps.detach() + noise(batch, seed + 20, spread)
    columns = {
        "advantages": advantages_S[batch.segment_ids],
        "ref_logps": logps.detach() + noise(batch, seed + 40, 0.6),
        "old_logps": old,
        "rollout_logps": old + noise(batch, seed + 30, 0.5),
    }
    return replace(batch, token=batch.token | columns), logps


def by_answer(values: Tensor, batch: Batch) -> Tensor:
    return padded(values * batch.trained, batch, torch.arange(batch.num_segments))


def trl_loss(batch: Batch, logps: Tensor, **options) -> tuple[Tensor, Tensor, dict[str, float]]:
    """TRL's loss and metrics on the same numbers."""
    settings = {
        "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.15,
        "epsilon_high": 0.3, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "use_vllm": False, "vllm_importance_sampling_correction": False, "max_completion_length": 20,
        "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1,
    }  # fmt: skip
    extra = options.pop("inputs", {})
    arguments = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    arguments |= options.pop("args", {})
    table = by_answer(logps, batch)
    trainer = trl_trainer(GRPOTrainer, torch.nn.Module().train(), None, **(settings | options))
    trainer.args = SimpleNamespace(**arguments)
    trainer.accelerator.num_processes, trainer.accelerator.reduce = 1, lambda x, **_: x
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (table, torch.zeros_like(table), None)
    mask = by_answer(batch.trained.long(), batch)
    inputs = {
        "prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0],
        "completion_ids": mask, "completion_mask": mask,
        "advantages": by_answer(batch.token["advantages"], batch).sum(1) / mask.sum(1),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": by_answer(batch.token["old_logps"], batch),
        "ref_per_token_logps": by_answer(batch.token["ref_logps"], batch),
    }  # fmt: skip
    loss = trainer._compute_loss(trainer.model, inputs | extra)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient, {k: v[0] for k, v in trainer._metrics["train"].items()}


CASES = [
    *[(name, level, {}) for name in LOSSES for level in ("token", "sequence")],
    ("cispo", "token", {"epsilon_high": 1.1}),
    *[("grpo", level, {"beta": 0.0, "delta": 1.4}) for level in ("token", "sequence")],
    ("sapo", "token", {"tau_pos": 1.0, "tau_neg": 1.25}),
]


@pytest.mark.parametrize(
    ("loss_type", "level", "options"), CASES, ids=["-".join((*c[:2], *c[2])) for c in CASES]
)
def test_losses_equal_trl(loss_type, level, options):
    rule = PolicyRule(**OPTIONS | {"loss_type": loss_type, "importance_sampling_level": level} | options)
    args = {"delta": rule.delta, "sapo_temperature_pos": rule.tau_pos, "sapo_temperature_neg": rule.tau_neg}
    for seed in range(3):
        batch, logps = policy_batch(seed=seed)
        loss, gradient = loss_and_gradient(Policy(rule), batch, logps)
        expected, expected_gradient, theirs = trl_loss(
            batch, logps, loss_type=loss_type, importance_sampling_level=level, beta=rule.beta,
            epsilon_high=rule.epsilon_high, args=args,
        )  # fmt: skip
        assert_same(loss, expected)
        assert_same(gradient, expected_gradient)
        result = Policy(rule)(TokenStats(logps=logps), batch)
        assert {n: metric(result, n) for n in result.metrics} == pytest.approx(
            {n: theirs[n] for n in result.metrics}, rel=1e-6
        )
        if loss_type == "grpo" and level == "token" and not options:
            assert 0 < theirs["clip_ratio/low_mean"] < theirs["clip_ratio/region_mean"] < 1


def test_corrections_equal_trl():
    """Weights of the tokens' ratios multiply the policy's part; left-behind bad answers drop out of it."""
    batch, logps = policy_batch()
    kept = (torch.arange(batch.num_tokens) % 3 > 0).double()
    batch = replace(batch, token=batch.token | {"entropy_kept": kept})
    gap = batch.token["old_logps"] - batch.token["rollout_logps"]
    rule = PolicyRule(
        **OPTIONS, rollout_importance_sampling_mode="token_mask", rollout_importance_sampling_threshold=1.2,
        off_policy_sequence_mask_delta=0.02, has_rollout_logps=True,
    )  # fmt: skip
    weights = torch.where(gap.exp() <= 1.2, gap.exp(), 0.0) * kept
    loss, gradient = loss_and_gradient(Policy(rule), batch, logps)
    expected, expected_gradient, _ = trl_loss(
        batch, logps, beta=rule.beta, use_vllm=True, vllm_importance_sampling_correction=True,
        off_policy_mask_threshold=0.02,
        inputs={
            "importance_sampling_ratio": by_answer(weights, batch),
            "sampling_per_token_logps": by_answer(batch.token["rollout_logps"], batch),
        },
    )  # fmt: skip
    assert_same(loss, expected)
    assert_same(gradient, expected_gradient)
    moved = batch.token["rollout_logps"] - logps.detach()
    dropped = [
        float(moved[batch.trained & (batch.segment_ids == s)].mean()) > 0.02 and s in (1, 3) for s in range(6)
    ]
    assert any(dropped), "the case has to drop an answer"


@pytest.mark.parametrize("mode", MODES)
def test_rollout_weights_are_bounded_ratios(mode):
    batch, _ = policy_batch()
    gap = batch.token["old_logps"] - batch.token["rollout_logps"]
    ours = rollout_weights(gap, batch, mode=mode, threshold=1.1)
    for s in range(batch.num_segments):
        mine = batch.trained & (batch.segment_ids == s)
        ratios, mean = [math.exp(x) for x in gap[mine]], math.exp(gap[mine].mean())
        expected = {
            "token_truncate": [min(r, 1.1) for r in ratios],
            "token_mask": [r if r <= 1.1 else 0.0 for r in ratios],
            "sequence_truncate": [min(mean, 1.1)] * len(ratios),
            "sequence_mask": [r if mean <= 1.1 else 0.0 for r in ratios],
        }[mode]
        assert ours[mine].tolist() == pytest.approx(expected, rel=1e-12)


def test_gspo_is_the_formula_of_the_paper():
    """arXiv:2507.18071 eq. 5 and 7, and eq. 13 and 14 of GSPO-token, whose gradient is the same."""
    batch, logps = policy_batch()
    parts = []
    for s in range(batch.num_segments):
        mine = batch.trained & (batch.segment_ids == s)
        likelihood = (logps[mine].sum() - batch.token["old_logps"][mine].sum()).exp()
        ratio, advantage = likelihood ** (1 / float(mine.sum())), batch.token["advantages"][mine][0]
        parts.append(torch.minimum(ratio * advantage, ratio.clamp(1 - 0.05, 1 + 0.08) * advantage))
    expected = -torch.stack(parts).mean()
    (expected_gradient,) = torch.autograd.grad(expected, logps)
    for level in ("sequence", "sequence_token"):
        rule = PolicyRule(importance_sampling_level=level, epsilon=0.05, epsilon_high=0.08, beta=0.0)
        loss, gradient = loss_and_gradient(Policy(rule), batch, logps)
        assert_same(loss, expected.detach())
        assert_same(gradient, expected_gradient)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(loss_type, level):
    """The gradient is that of REINFORCE with a baseline, whatever the rule for tokens and the bounds."""
    batch, logps = policy_batch()
    del batch.token["old_logps"]
    high = 5.0 if loss_type == "cispo" else 1e-6  # which is the weight itself for cispo
    rule = PolicyRule(
        loss_type=loss_type, importance_sampling_level=level, epsilon=1e-6, epsilon_high=high, beta=0.0,
        tau_neg=1.5, max_completion_length=20,
    )  # fmt: skip
    _, gradient = loss_and_gradient(Policy(rule), batch, logps)
    counts = torch.bincount(batch.segment_ids[batch.trained]).double()[batch.segment_ids]
    unit = LOSSES[loss_type][1]
    share = {"sequences": 1 / counts / 6, "tokens": 1 / counts.new_tensor(31), "budget": 1 / 120}[unit]
    advantages = batch.token["advantages"]
    assert_same(gradient, -advantages * batch.trained * share)
    result = Policy(rule)(TokenStats(logps=logps), batch)
    clipped = [metric(result, name) for name in result.metrics if "clip" in name]
    assert clipped == [0.0] * len(clipped)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_cut_into_micro_batches_changes_nothing(loss_type, level):
    rule = PolicyRule(
        **OPTIONS, loss_type=loss_type, importance_sampling_level=level,
        has_rollout_logps=True, log_entropy=True,
        rollout_importance_sampling_mode="sequence_truncate", off_policy_sequence_mask_delta=0.05,
    )  # fmt: skip
    objective, (batch, logps) = Policy(rule), policy_batch()
    labels = batch.labels.clone()
    labels[batch.segment_ids == 4] = (
        IGNORED  # as --overlong_filter does: the answer counts, and teaches nothing
    )
    batch = replace(batch, labels=labels)
    entropy = logps.detach().square()

    def stats_of(logps_T: Tensor) -> TokenStats:
        return TokenStats(logps=logps_T, entropy=logps_T.detach().square())

    whole = total_loss(objective, [objective(TokenStats(logps, entropy=entropy), batch)], [batch])
    (gradient,) = torch.autograd.grad(whole, logps)
    parts = [select(batch, logps, rows) for rows in ([4], [0, 2], [1, 3, 5])]
    batches = [part for part, _ in parts] + [NOTHING]
    nothing = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    results = [objective(stats_of(s.logps), b) for b, s in parts] + [objective(stats_of(nothing), NOTHING)]
    split = total_loss(objective, results, batches)
    assert_same(split.detach(), whole.detach(), 1e-12)
    assert_same(torch.autograd.grad(split, logps, retain_graph=True)[0], gradient, 1e-12)
    assert float(torch.autograd.grad(split, nothing)[0]) == 0.0
    sums = collect_sums(results, [objective.units(b) for b in batches]).means()
    expected = collect_sums([objective(stats_of(logps), batch)], [objective.units(batch)]).means()
    assert sums == pytest.approx(expected, rel=1e-12) and "rollout/logp_diff_max" in sums
    if LOSSES[loss_type][1] == "sequences":
        assert objective.units(batch) == {"sequences": 6} and objective.units(NOTHING) == {"sequences": 0}


def test_metrics_of_entropy_and_mismatch():
    batch, logps = policy_batch()
    entropy = logps.detach().abs() + 0.5
    result = Policy(PolicyRule(beta=0.0, log_entropy=True, has_rollout_logps=True))(
        TokenStats(logps=logps, entropy=entropy), batch
    )
    trained = batch.trained
    means = [float(entropy[trained & (batch.segment_ids == s)].mean()) for s in range(6)]
    gap = (batch.token["old_logps"] - batch.token["rollout_logps"])[trained]
    sizes = []
    for s in range(6):
        w = (batch.token["old_logps"] - batch.token["rollout_logps"])[
            trained & (batch.segment_ids == s)
        ].exp()
        sizes.append(float(w.sum() ** 2 / w.square().sum() / len(w)))
    expected = {
        "entropy/mean": float(entropy[trained].mean()), "entropy/min": min(means), "entropy/max": max(means),
        "rollout/logp_diff_mean": float(gap.abs().mean()), "rollout/logp_diff_max": float(gap.abs().max()),
        "rollout/kl": float((gap.exp() - gap - 1).mean()), "rollout/ess": sum(sizes) / 6,
    }  # fmt: skip
    assert {n: metric(result, n) for n in expected} == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["rollout/ess"] < 1


def test_the_distance_is_measured_alone_where_rewards_hold_its_pull():
    batch, logps = policy_batch()
    plain, _ = loss_and_gradient(Policy(PolicyRule(beta=0.0)), batch, logps)
    rule = PolicyRule(beta=0.3, kl_in_reward=True)
    loss, _ = loss_and_gradient(Policy(rule), batch, logps)
    assert loss == plain and metric(Policy(rule)(TokenStats(logps=logps), batch), "kl") > 0


def test_a_far_policy_stays_finite():
    batch, logps = policy_batch()
    batch.token["old_logps"] = batch.token["old_logps"] - 500 * batch.trained
    batch.token["ref_logps"] = batch.token["ref_logps"] + 500 * batch.trained
    for loss_type in LOSSES:
        loss, gradient = loss_and_gradient(Policy(PolicyRule(loss_type=loss_type)), batch, logps)
        assert loss.isfinite() and gradient.isfinite().all()
    result = Policy(PolicyRule())(TokenStats(logps=logps), batch)
    assert metric(result, "kl") == 10.0


def test_tokens_above_the_threshold_of_entropy_are_a_share():
    entropy = torch.tensor([0.1, 2.0, 0.5, 1.0, 3.0])
    assert entropy_threshold(entropy, 0.4) == 2.0
    assert entropy_threshold(entropy, 1.0) == pytest.approx(0.1)
    assert entropy_threshold(entropy, 0.01) == 3.0 and entropy_threshold(entropy[:0], 0.2) == 0.0


def test_extremes_keep_the_least_and_the_largest():
    sums = Sums()
    for value, count in ((0.0, 0.0), (0.5, 1.0), (0.2, 1.0), (0.0, 0.0), (0.7, 1.0)):
        for name in ("clip_ratio/low_min", "entropy/max", "loss_max", "completions/max_length"):
            sums.add(name, value, count)
    other = Sums({"clip_ratio/low_min": (0.3, 1.0), "entropy/max": (0.9, 1.0), "entropy/min": (0.0, 0.0)})
    sums.merge(other)
    assert sums.means() == {
        "clip_ratio/low_min": 0.2, "entropy/max": 0.9, "completions/max_length": 0.7,
        "loss_max": pytest.approx(1.4 / 3),
    }  # fmt: skip
