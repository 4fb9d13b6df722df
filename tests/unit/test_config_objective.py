"""Which flags of `swift rlhf` go together, what is said when they do not, and the objective they build."""

import pytest

from swift.config.objective import LOSSES, LOSSES_OF, METHODS_OF, RLHF_TYPES, RlhfConfig
from swift.config.online import OnlineConfig
from swift.config.option import ConfigError, build, iterate_knobs
from swift.config.ppo import PpoConfig
from swift.objectives.build import BUILDERS, build_objective
from swift.objectives.distill import Distill
from swift.objectives.kto import Kto
from swift.objectives.policy import Policy, PolicyRule
from swift.objectives.preference import RULES, Preference
from swift.objectives.reward import Reward

REFUSED = [
    ({"loss_type": ("kto",)}, "--loss_type kto is not a loss of --rlhf_type dpo"),
    ({"rlhf_type": "cpo", "loss_type": ("robust",)}, "--loss_type robust is not a loss of --rlhf_type cpo"),
    ({"rlhf_type": "simpo", "loss_type": ("hinge",)}, "--loss_type hinge is not a loss of --rlhf_type simpo"),
    (
        {"rlhf_type": "orpo", "loss_type": ("sigmoid",)},
        "--rlhf_type orpo has one loss: leave --loss_type out",
    ),
    ({"loss_type": ("ipo", "ipo")}, "--loss_type names a loss twice: ipo ipo"),
    (
        {"rlhf_type": "cpo", "loss_type": ("ipo", "hinge")},
        "--loss_type ipo hinge: only --rlhf_type dpo mixes losses",
    ),
    (
        {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)},
        "--loss_weights has 1 values for 2 in --loss_type",
    ),
    ({"loss_weights": (1.0, 2.0)}, "--loss_weights has 2 values for 1 in --loss_type"),
    ({"rlhf_type": "orpo", "rpo_alpha": 1.0}, "--rpo_alpha has no effect with --rlhf_type orpo"),
    ({"simpo_gamma": 0.5}, "--simpo_gamma has no effect with --rlhf_type dpo"),
    ({"rlhf_type": "cpo", "simpo_gamma": 0.5}, "--simpo_gamma has no effect with --loss_type sigmoid"),
    (
        {"loss_type": ("ipo", "hinge"), "label_smoothing": 0.1},
        "--label_smoothing has no effect with --loss_type ipo hinge",
    ),
    (
        {"loss_type": ("apo_zero",), "f_divergence_type": "js_divergence"},
        "--f_divergence_type has no effect with --loss_type apo_zero",
    ),
    ({"rlhf_type": "rm", "beta": 0.1}, "--beta has no effect with --rlhf_type rm"),
    ({"rlhf_type": "simpo", "ref_model": "m"}, "--ref_model has no effect with --rlhf_type simpo"),
    ({"discopop_tau": 0.1}, "--discopop_tau has no effect with --loss_type sigmoid"),
    ({"loss_type": ("discopop",), "discopop_tau": 0.0}, "--discopop_tau must be above 0, got 0.0"),
    ({"beta": 0.0}, "--beta must be above 0, got 0"),
    (
        {"loss_type": ("robust",), "label_smoothing": 0.5},
        "--label_smoothing 0.5 makes the robust loss infinite",
    ),
    (
        {"reference_free": True, "ref_model": "m"},
        "--ref_model and --reference_free true contradict each other",
    ),
    (
        {"f_alpha_divergence_coef": 0.5},
        "--f_alpha_divergence_coef needs --f_divergence_type alpha_divergence",
    ),
    (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0},
        "--f_alpha_divergence_coef 0 is the reverse KL",
    ),
    ({"ref_model_sync_steps": 8}, "--ref_model_sync_steps has no effect without --sync_ref_model true"),
    (
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
        "--sync_ref_model and --precompute_ref_log_probs contradict each other",
    ),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[m.split(":")[0] for _, m in REFUSED])
def test_contradictions_are_refused(flags, message):
    with pytest.raises(ConfigError) as error:
        build_objective(build(RlhfConfig, flags), OnlineConfig(), PpoConfig())
    assert error.value.message == message


def test_a_hint_names_the_losses_of_the_method():
    with pytest.raises(ConfigError) as error:
        RlhfConfig(rlhf_type="cpo", loss_type=("hinge",), label_smoothing=0.1).check()
    assert error.value.hint == "it belongs to sigmoid, simpo"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"label_smoothing": 0.6}, "--label_smoothing must be from 0 to 0.5, got 0.6"),
        ({"ld_alpha": 1.5}, "--ld_alpha must be from 0 to 1, got 1.5"),
        ({"beta": -1.0}, "--beta must be at least 0, got -1.0"),
    ],
)
def test_bounds(flags, message):
    with pytest.raises(ConfigError) as error:
        build(RlhfConfig, flags)
    assert error.value.message == message


def test_tables_name_what_exists():
    knobs = {knob.name for knob in iterate_knobs(RlhfConfig)}
    assert set(METHODS_OF) == knobs - {"rlhf_type", "loss_type"}
    assert set(LOSSES_OF) < knobs
    assert {*BUILDERS, "grpo", "ppo"} == set(RLHF_TYPES)
    assert set(LOSSES["dpo"]) | set(LOSSES["cpo"]) == set(RULES) - {"orpo"} | {"sft"}
    assert {name for names in LOSSES_OF.values() for name in names} <= set(RULES)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, Preference()),
        (
            {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0), "rpo_alpha": 0.5},
            Preference(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0), rpo_alpha=0.5),
        ),
        ({"loss_type": ("ipo", "hinge")}, Preference(("ipo", "hinge"), (1.0, 1.0))),
        ({"ld_alpha": 0.0, "beta": 0.3}, Preference(ld_alpha=0.0, beta=0.3)),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
            Preference(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5),
        ),
        ({"rlhf_type": "cpo"}, Preference(rpo_alpha=1.0, reference_free=True)),
        (
            {"rlhf_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5},
            Preference(("simpo",), beta=2.0, simpo_gamma=0.5, reference_free=True),
        ),
        ({"rlhf_type": "orpo"}, Preference(("orpo",), rpo_alpha=1.0, reference_free=True)),
        ({"rlhf_type": "kto", "undesirable_weight": 0.5}, Kto(undesirable_weight=0.5)),
        ({"rlhf_type": "kto", "loss_type": ("apo_zero_unpaired",)}, Kto("apo_zero_unpaired")),
        ({"rlhf_type": "gkd", "teacher_model": "t", "beta": 1.0}, Distill(1.0)),
        (
            {"rlhf_type": "grpo", "loss_type": ("dapo",), "beta": 0.0},
            Policy(PolicyRule(loss_type="dapo", beta=0.0, has_rollout_logps=True)),
        ),
        ({"rlhf_type": "rm", "center_rewards_coefficient": 0.01}, Reward(center=0.01)),
    ],
)
def test_flags_build_the_objective(flags, expected):
    assert build_objective(build(RlhfConfig, flags), OnlineConfig(), PpoConfig()) == expected


def test_who_needs_a_reference():
    assert {t for t in RLHF_TYPES if RlhfConfig(rlhf_type=t).needs_reference} == {"dpo", "kto", "grpo", "ppo"}
    assert not RlhfConfig(reference_free=True).needs_reference
