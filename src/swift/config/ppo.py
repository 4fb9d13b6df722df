"""PPO: how often a rollout is learnt from, how far a step may go, what its value model is asked."""

from dataclasses import dataclass, fields

from swift.config.option import ConfigError, option


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoConfig:
    num_ppo_epochs: int = option(4, help="times that each answer is learnt from", range=(1, None))
    num_mini_batches: int = option(
        1, help="optimizer steps that a rollout is cut into, each time", range=(1, None)
    )
    kl_coef: float = option(0.05, help="price of a token's distance from the reference", range=(0, None))
    whiten_rewards: bool = option(False, help="bring rewards to a deviation of 1 before they are added up")
    cliprange: float = option(0.2, help="how far the ratio to the old policy may be from 1", range=(0, None))
    cliprange_value: float = option(0.2, help="how far a value may move from the old one", range=(0, None))
    vf_coef: float = option(0.1, help="weight of the value model's loss", range=(0, None))
    gamma: float = option(1.0, help="what a later reward is worth now", range=(0, 1))
    lam: float = option(0.95, help="how far advantages look ahead: 0 = a token, 1 = to the end", range=(0, 1))

    def check(self, rlhf_type: str) -> None:
        """Raises ConfigError where a flag is given for another method."""
        for field in fields(self):
            if rlhf_type != "ppo" and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"--{field.name} has no effect with --rlhf_type {rlhf_type}",
                    hint="it belongs to ppo; leave it out",
                )
