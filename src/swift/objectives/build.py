"""The objective that a config asks for."""

from collections.abc import Callable
from dataclasses import fields

from swift.config.objective import RlhfConfig
from swift.config.online import OnlineConfig
from swift.config.ppo import PpoConfig
from swift.objectives.distill import Distill
from swift.objectives.kto import Kto
from swift.objectives.policy import Policy, PolicyRule
from swift.objectives.preference import Preference
from swift.objectives.reward import Reward
from swift.objectives.types import Objective


def build_objective(config: RlhfConfig, online: OnlineConfig, ppo: PpoConfig) -> Objective:
    """The objective of `config.rlhf_type`. Raises ConfigError where flags contradict each other."""
    config.check()
    if config.rlhf_type == "grpo":
        return _build_policy(config, online)
    if config.rlhf_type == "ppo":
        # The pull to the reference is in the rewards; here it is measured alone.
        return Policy(
            PolicyRule(
                loss_type="dapo", epsilon=ppo.cliprange, beta=1.0, kl_in_reward=True,
                log_entropy=online.log_entropy, has_rollout_logps=True,
            )
        )  # fmt: skip
    return BUILDERS[config.rlhf_type](config)


def _build_dpo(config: RlhfConfig) -> Preference:
    return Preference(
        loss_type=config.losses,
        loss_weights=config.loss_weights or (1.0,) * len(config.losses),
        beta=config.beta_value,
        label_smoothing=config.label_smoothing,
        rpo_alpha=config.rpo_alpha or 0.0,
        ld_alpha=1.0 if config.ld_alpha is None else config.ld_alpha,
        discopop_tau=config.discopop_tau,
        reference_free=config.reference_free,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
    )


def _build_cpo(config: RlhfConfig) -> Preference:
    return Preference(
        loss_type=config.losses,
        beta=config.beta_value,
        label_smoothing=config.label_smoothing,
        rpo_alpha=config.cpo_alpha,
        simpo_gamma=config.simpo_gamma,
        reference_free=True,
    )


def _build_kto(config: RlhfConfig) -> Kto:
    return Kto(
        loss_type=config.losses[0],
        beta=config.beta_value,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )


def _build_policy(config: RlhfConfig, online: OnlineConfig) -> Policy:
    shared = {f.name: getattr(online, f.name) for f in fields(PolicyRule) if hasattr(online, f.name)}
    return Policy(
        PolicyRule(**shared, loss_type=config.losses[0], beta=config.beta_value, has_rollout_logps=True)
    )


def _build_gkd(config: RlhfConfig) -> Distill:
    return Distill(config.beta_value, config.gkd_logits_topk, config.sft_alpha)


BUILDERS: dict[str, Callable[[RlhfConfig], Objective]] = {
    "dpo": _build_dpo,
    "cpo": _build_cpo,
    "simpo": _build_cpo,
    "orpo": lambda c: Preference(("orpo",), beta=c.beta_value, rpo_alpha=1.0, reference_free=True),
    "kto": _build_kto,
    "gkd": _build_gkd,
    "rm": lambda config: Reward(center=config.center_rewards_coefficient or 0.0),
}
