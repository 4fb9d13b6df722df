"""The objective that a config asks for."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from swift.config.objective import RlhfConfig
from swift.config.online import OnlineConfig
from swift.config.ppo import PpoConfig
from swift.objectives.distill import Distill
from swift.objectives.kto import Kto
from swift.objectives.policy import Policy, PolicyRule
from swift.objectives.preference import Preference
from swift.objectives.reward import Reward
from swift.objectives.types import Objective

Filled = TypeVar("Filled")


def build_objective(config: RlhfConfig, online: OnlineConfig, ppo: PpoConfig) -> Objective:
    """The objective of `config.rlhf_type`. Raises ConfigError where flags contradict each other."""
    config.check()
    if config.rlhf_type == "grpo":
        own = {"loss_type": config.losses[0], "beta": config.beta_value, "has_rollout_logps": True}
        return Policy(_fill(PolicyRule, online, own))
    if config.rlhf_type == "ppo":
        # The pull to the reference is in the rewards; here it is measured alone.
        return Policy(
            PolicyRule(
                loss_type="dapo", epsilon=ppo.cliprange, beta=1.0, kl_in_reward=True,
                log_entropy=online.log_entropy, has_rollout_logps=True,
            )
        )  # fmt: skip
    return BUILDERS[config.rlhf_type](config)


def _fill(kind: type[Filled], flags: Any, own: dict[str, Any]) -> Filled:
    """What a frozen record holds: the flags of the same names, but for `own`."""
    names = {field.name for field in fields(kind)} & {field.name for field in fields(flags)}
    return kind(**{name: getattr(flags, name) for name in names} | own)


def _build_pairs(config: RlhfConfig) -> Preference:
    losses = config.losses or ("orpo",)
    own = {
        "loss_type": losses,
        "loss_weights": config.loss_weights or (1.0,) * len(losses),
        "beta": config.beta_value,
        "rpo_alpha": config.rpo_alpha or 0.0,
        "ld_alpha": 1.0 if config.ld_alpha is None else config.ld_alpha,
    }
    if config.rlhf_type != "dpo":  # orpo has no --cpo_alpha but its default, which is the paper's 1
        own |= {"rpo_alpha": config.cpo_alpha, "reference_free": True}
    return _fill(Preference, config, own)


BUILDERS: dict[str, Callable[[RlhfConfig], Objective]] = {
    **dict.fromkeys(("dpo", "cpo", "simpo", "orpo"), _build_pairs),
    "kto": lambda c: _fill(Kto, c, {"loss_type": c.losses[0], "beta": c.beta_value}),
    "gkd": lambda c: Distill(c.beta_value, c.gkd_logits_topk, c.sft_alpha),
    "rm": lambda c: Reward(center=c.center_rewards_coefficient or 0.0),
}
