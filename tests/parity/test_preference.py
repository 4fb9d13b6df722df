"""Preference losses: values and gradients in float64 against TRL, or against the formula of the paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity_batches import (
    FakeModel,
    assert_same,
    completion_mask,
    loss_and_gradient,
    make_batch,
    make_logps,
    make_stats,
    metric,
    padded,
    select,
    total_loss,
    trl_trainer,
)
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from swift.config.objective import LOSSES
from swift.objectives.preference import RANKED, RULES, Preference, match_ranks
from swift.objectives.types import TokenStats

LENGTHS = [6, 9, 12, 4, 7, 7, 5, 10]  # four pairs, answers of different lengths
TRL_NAMES = {"aot_pair": "aot_unpaired"}
MIXED = ("sigmoid", "bco_pair", "sft")  # MPO, arXiv:2411.10442


def zero_delta(batch):
    batch.segment["bco_delta"] = torch.zeros(batch.num_segments, dtype=torch.float64)
    return batch


def trl_dpo(batch, logps, losses, weights, **options):
    """TRL's DPO loss and its metrics on the same numbers; its rows are all chosen, then all rejected."""
    order = torch.cat([torch.arange(0, batch.num_segments, 2), torch.arange(1, batch.num_segments, 2)])
    model = FakeModel(padded(logps * batch.trained, batch, order))
    settings = {"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "f_divergence_type": "reverse_kl"}
    trainer = trl_trainer(
        DPOTrainer,
        model,
        FakeModel(padded(batch.token["ref_logps"], batch, order)),
        use_weighting=False,
        f_alpha_divergence_coef=1.0,
        loss_types=[TRL_NAMES.get(name, name) for name in losses],
        loss_weights=list(weights),
        **(settings | options),
    )
    mask = completion_mask(batch, order)
    inputs = {"input_ids": torch.zeros_like(mask), "completion_mask": mask, "attention_mask": mask}
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient, {k: v[0] for k, v in trainer._metrics["train"].items() if "/" in k}


CASES = [
    *[((name,), (1.0,), {}) for name in LOSSES["dpo"] if name != "exo_pair"],
    *[((name,), (1.0,), {"label_smoothing": 0.2}) for name in ("exo_pair", "robust", "aot", "aot_pair")],
    *[((name,), (1.0,), {"f_divergence_type": "js_divergence"}) for name in ("sigmoid", "ipo", "hinge")],
    *[((name,), (1.0,), {"ld_alpha": 0.3}) for name in ("sigmoid", "ipo", "apo_down")],
    (("sigmoid",), (1.0,), {"beta": 0.7}),
    (("discopop",), (1.0,), {"beta": 0.7}),
    (MIXED, (0.8, 0.2, 1.0), {}),
    (("apo_zero", "ipo"), (0.3, 2.0), {}),
]


@pytest.mark.parametrize(
    ("losses", "weights", "options"), CASES, ids=["+".join((*c[0], *map(str, c[2].values()))) for c in CASES]
)
def test_dpo_losses_equal_trl(losses, weights, options):
    for seed in range(3):
        batch = zero_delta(make_batch(LENGTHS, seed=seed))
        logps = make_logps(batch, seed=seed + 10)
        objective = Preference(loss_type=losses, loss_weights=weights, **options)
        loss, gradient = loss_and_gradient(objective, batch, logps)
        expected, expected_gradient, metrics = trl_dpo(batch, logps, losses, weights, **options)
        tolerance = 1e-6 if losses == ("exo_pair",) else 1e-10  # TRL takes the logs of its labels in float32
        assert_same(loss, expected, tolerance)
        assert_same(gradient, expected_gradient, tolerance)
        if losses != ("ipo",):  # whose rewards are a token's here, as in TRL before 1.0
            result = objective(make_stats(logps), batch)
            names = {k for k in metrics if k.startswith(("rewards/", "logps/"))}
            assert {n: metric(result, n) for n in names} == pytest.approx({n: metrics[n] for n in names})


def test_every_loss_of_the_config_is_proven():
    proven = {name for losses, _, _ in CASES for name in losses}
    assert proven == set(LOSSES["dpo"])
    assert set(RULES) | {"sft"} == proven | {"simpo", "orpo"}


def pair_numbers(batch, logps):
    """[P] by a loop: sums of chosen, rejected, reference chosen, reference rejected; two token counts."""
    rows = []
    for values in (logps, batch.token["ref_logps"]):
        sums = [values[(batch.segment_ids == s) & batch.trained].sum() for s in range(batch.num_segments)]
        rows += [torch.stack(sums[0::2]), torch.stack(sums[1::2])]
    counts = [batch.trained[batch.segment_ids == s].sum() for s in range(batch.num_segments)]
    return (*rows, torch.stack(counts[0::2]), torch.stack(counts[1::2]))


def assert_formula(objective, formula, **columns):
    for seed in range(3):
        batch = make_batch(LENGTHS, seed=seed, **columns)
        logps = make_logps(batch, seed=seed + 10)
        loss, gradient = loss_and_gradient(objective, batch, logps)
        expected = formula(batch, *pair_numbers(batch, logps))
        assert_same(loss, expected.detach())
        assert_same(gradient, torch.autograd.grad(expected, logps)[0])


def test_smoothed_sigmoid_is_the_mixture_of_both_labels():
    def formula(_, chosen, rejected, ref_chosen, ref_rejected, *__):
        p = torch.sigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)))
        return -(0.85 * p.log() + 0.15 * (1 - p).log()).mean()

    assert_formula(Preference(label_smoothing=0.15), formula)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_alpha_divergence_is_the_papers(alpha):
    """f'(u) = (1 - u^-alpha) / alpha, arXiv:2309.16240 table 1."""

    def formula(_, chosen, rejected, ref_chosen, ref_rejected, *__):
        u, v = (chosen - ref_chosen).exp(), (rejected - ref_rejected).exp()
        return -torch.sigmoid(0.1 * ((1 - u**-alpha) - (1 - v**-alpha)) / alpha).log().mean()

    objective = Preference(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
    assert_formula(objective, formula)


def test_alpha_divergence_towards_zero_is_the_reverse_kl():
    batch = make_batch(LENGTHS)
    logps = make_logps(batch)
    nearly = Preference(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1e-7)
    assert_same(
        loss_and_gradient(nearly, batch, logps)[1], loss_and_gradient(Preference(), batch, logps)[1], 1e-5
    )


def test_exo_is_the_reverse_kl_to_the_smoothed_labels():
    def formula(_, chosen, rejected, ref_chosen, ref_rejected, *__):
        p = torch.sigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)))
        return (p * (p / 0.8).log() + (1 - p) * ((1 - p) / 0.2).log()).mean()

    assert_formula(Preference(loss_type=("exo_pair",), label_smoothing=0.2), formula)


def test_bco_subtracts_the_running_mean():
    def formula(_, chosen, rejected, ref_chosen, ref_rejected, *__):
        good, bad = 0.1 * (chosen - ref_chosen) - 0.4, 0.1 * (rejected - ref_rejected) - 0.4
        return -(torch.sigmoid(good).log() + torch.sigmoid(-bad).log()).mean()

    delta = torch.full((len(LENGTHS),), 0.4, dtype=torch.float64)
    assert_formula(Preference(loss_type=("bco_pair",)), formula, bco_delta=delta)


def test_likelihood_term_is_a_mean_over_the_chosen_tokens():
    def formula(batch, chosen, rejected, ref_chosen, ref_rejected, chosen_count, _):
        margin = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
        return -F.logsigmoid(margin).mean() - 0.7 * chosen.sum() / chosen_count.sum()

    assert_formula(Preference(rpo_alpha=0.7), formula)


def test_reference_free_needs_no_reference():
    def formula(_, chosen, rejected, *__):
        return -torch.sigmoid(0.1 * (chosen - rejected)).log().mean()

    assert_formula(Preference(reference_free=True), formula)
    batch = make_batch([5, 6])
    logps = make_logps(batch)
    batch.token.clear()
    assert loss_and_gradient(Preference(reference_free=True), batch, logps)[0].isfinite()
    with pytest.raises(KeyError, match="ref_logps"):
        loss_and_gradient(Preference(), batch, logps)


@pytest.mark.parametrize("name", LOSSES["cpo"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_and_simpo_equal_trl(name, smoothing):
    trainer = trl_trainer(
        CPOTrainer,
        None,
        None,
        beta=2.0,
        label_smoothing=smoothing,
        loss_type=name,
        simpo_gamma=0.5,
        alpha=0.0,
    )

    def formula(_, chosen, rejected, __, ___, chosen_count, rejected_count):
        nll = -chosen.sum() / chosen_count.sum()
        if name in ("ipo", "simpo"):  # TRL hands means to these
            chosen, rejected = chosen / chosen_count, rejected / rejected_count
        return trainer.cpo_loss(chosen, rejected)[0].mean() + 0.3 * nll

    objective = Preference(
        loss_type=(name,),
        beta=2.0,
        label_smoothing=smoothing,
        simpo_gamma=0.5,
        rpo_alpha=0.3,
        reference_free=True,
    )
    assert_formula(objective, formula)


def test_orpo_is_likelihood_plus_the_odds_ratio():
    """Odds p / (1 - p) of the mean log-probability, arXiv:2403.07691 eq. 4, 6 and 7."""

    def formula(_, chosen, rejected, __, ___, chosen_count, rejected_count):
        p, q = (chosen / chosen_count).exp(), (rejected / rejected_count).exp()
        ratio = (p / (1 - p)) / (q / (1 - q))
        return -chosen.sum() / chosen_count.sum() - 0.25 * torch.sigmoid(ratio.log()).log().mean()

    assert_formula(ORPO, formula)


ORPO = Preference(loss_type=("orpo",), beta=0.25, rpo_alpha=1.0, reference_free=True)


def test_orpo_logs_what_trl_logs():
    """TRL works in float32 here."""
    batch = make_batch(LENGTHS)
    logps = make_logps(batch).detach()
    chosen, rejected, _, _, chosen_count, rejected_count = pair_numbers(batch, logps)
    trainer = trl_trainer(ORPOTrainer, None, None, beta=0.25)
    losses, good, bad, ratio, odds = trainer.odds_ratio_loss(chosen / chosen_count, rejected / rejected_count)
    expected = {
        "rewards/chosen": good.mean(),
        "rewards/rejected": bad.mean(),
        "log_odds_ratio": ratio,
        "log_odds_chosen": odds,
        "logps/chosen": (chosen / chosen_count).mean(),
        "nll_loss": -chosen.sum() / chosen_count.sum(),
    }
    result = ORPO(make_stats(logps), batch)
    assert {k: metric(result, k) for k in expected} == pytest.approx(
        {k: float(v) for k, v in expected.items()}
    )
    assert float(result.terms["pairs"]) == pytest.approx(-float(losses.sum()))


FIRST_STEP = {
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.1**2),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 * (0.5 / 0.1) ** 2,
    "aot_pair": math.log(2),
    "aot": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * (math.log(2) + 1),
    "exo_pair": 0.5 * (math.log(0.5 / 0.8) + math.log(0.5 / 0.2)),
}


@pytest.mark.parametrize("name", FIRST_STEP)
def test_first_step_before_anything_is_learned(name):
    """The policy is the reference: no margins, and the loss is a constant of the method."""
    batch = zero_delta(make_batch(LENGTHS))
    smoothing = 0.2 if name in ("exo_pair", "robust", "sigmoid") else 0.0
    objective = Preference(loss_type=(name,), label_smoothing=smoothing)
    logps = batch.token["ref_logps"].clone().requires_grad_()
    loss, gradient = loss_and_gradient(objective, batch, logps)
    assert float(loss) == pytest.approx(FIRST_STEP[name], rel=1e-12)
    assert gradient.abs().sum() > 0
    result = objective(make_stats(logps), batch)
    for metric_name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert metric(result, metric_name) == 0.0


def test_exo_without_smoothing_counts_as_a_thousandth():
    batch = make_batch(LENGTHS)
    logps = make_logps(batch)
    plain = loss_and_gradient(Preference(loss_type=("exo_pair",)), batch, logps)[0]
    smoothed = loss_and_gradient(Preference(loss_type=("exo_pair",), label_smoothing=1e-3), batch, logps)[0]
    assert plain == smoothed and plain.isfinite()


INVARIANT = [
    *[Preference(loss_type=(name,), rpo_alpha=0.5) for name in RULES if name not in RANKED],
    Preference(loss_type=MIXED, loss_weights=(0.8, 0.2, 1.0), ld_alpha=0.4),
]


@pytest.mark.parametrize("objective", INVARIANT, ids=lambda o: "+".join(o.loss_type))
def test_a_packed_batch_is_the_sum_of_its_pairs(objective):
    batch = zero_delta(make_batch(LENGTHS))
    logps = make_logps(batch)
    loss, gradient = loss_and_gradient(objective, batch, logps)
    parts = [select(batch, logps, [s, s + 1]) for s in range(0, len(LENGTHS), 2)]
    results = [objective(stats, part) for part, stats in parts]
    split = total_loss(objective, results, [part for part, _ in parts])
    assert_same(loss, split.detach(), 1e-12)
    assert_same(gradient, torch.autograd.grad(split, logps)[0], 1e-12)
    whole = objective(make_stats(logps), batch).metrics
    for name, pair in whole.items():
        sums = [
            torch.stack([torch.as_tensor(r.metrics[name][i]).double() for r in results]).sum() for i in (0, 1)
        ]
        assert_same(torch.stack([torch.as_tensor(x).double() for x in pair]), torch.stack(sums), 1e-12)


@pytest.mark.parametrize("name", sorted(RANKED))
def test_ranked_losses_do_not_depend_on_micro_batches_when_partners_are_data(name):
    objective = Preference(loss_type=(name,), label_smoothing=0.1)
    batch = make_batch(LENGTHS, seed=1)
    logps = make_logps(batch, seed=11)
    loss, gradient = loss_and_gradient(objective, batch, logps)  # ranks within the one micro-batch
    alone = [select(batch, logps, [s, s + 1]) for s in range(0, len(LENGTHS), 2)]
    results = [objective(stats, part) for part, stats in alone]
    coupled = total_loss(objective, results, [part for part, _ in alone])
    assert abs(float(coupled.detach() - loss)) > 1e-4  # a rank among one is no rank

    with torch.no_grad():
        lists = [objective.score(stats, part).ranked_values(name) for part, stats in alone]
    partners = match_ranks(torch.cat([a for a, _ in lists]), torch.cat([b for _, b in lists]))
    batch.segment[f"{name}_partner"] = partners.flatten()
    parts = [select(batch, logps, [s, s + 1]) for s in range(0, len(LENGTHS), 2)]
    results = [objective(stats, part) for part, stats in parts]
    split = total_loss(objective, results, [part for part, _ in parts])
    assert_same(loss, split.detach(), 1e-12)
    assert_same(gradient, torch.autograd.grad(split, logps)[0], 1e-12)


@pytest.mark.parametrize("name", RULES)
def test_extreme_margins_keep_gradients_finite(name):
    """float32, where one answer is certain and the other impossible."""
    batch = zero_delta(make_batch([60, 60, 60, 60], trained_from=1))
    logps = torch.where(batch.segment_ids % 3 == 0, 0.0, -40.0) * batch.trained
    logps = logps.float().requires_grad_()
    for divergence in ("reverse_kl", "js_divergence", "alpha_divergence"):
        objective = Preference(loss_type=(name,), beta=2.0, f_divergence_type=divergence)
        loss = objective(TokenStats(logps=logps, logits_mean=logps.detach()), batch).terms["pairs"]
        (gradient,) = torch.autograd.grad(loss, logps)
        assert loss.isfinite() and gradient.isfinite().all()
