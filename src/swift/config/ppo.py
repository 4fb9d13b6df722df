"""PPO: how often a rollout is learnt from, how far a step may go, what its value model is asked."""

from dataclasses import dataclass

from swift.config.option import changed, option, refuse_method


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoConfig:
    num_ppo_epochs: int = option(4, "times that each answer is learnt from", min=1)
    num_mini_batches: int = option(1, "optimizer steps that a rollout is cut into, each time", min=1)
    kl_coef: float = option(0.05, "price of a token's distance from the reference", min=0)
    whiten_rewards: bool = option(False, "bring rewards to a deviation of 1 before they are added up")
    cliprange: float = option(0.2, "how far the ratio to the old policy may be from 1", min=0)
    cliprange_value: float = option(0.2, "how far a value may move from the old one", min=0)
    vf_coef: float = option(0.1, "weight of the value model's loss", min=0)
    gamma: float = option(1.0, "what a later reward is worth now", range=(0, 1))
    lam: float = option(0.95, "how far advantages look ahead: 0 = a token, 1 = to the end", range=(0, 1))

    def check(self, rlhf_type: str) -> None:
        refuse_method(self, changed(self), rlhf_type, ("ppo",))
