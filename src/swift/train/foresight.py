"""Advantages of every token of an answer, from a value model: what PPO learns from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swift.batch import Batch
from swift.config.ppo import PpoConfig
from swift.objectives.advantages import estimate_gae, token_rewards, whiten
from swift.train.actor_critic import ActorCritic
from swift.train.scoring import distance_from_reference


@dataclass(frozen=True)
class Foresight:
    """Called by every rank, with batches that have ref_logps and old_logps."""

    engine: ActorCritic
    config: PpoConfig

    def __call__(self, batches: list[Batch], rewards: Tensor) -> list[Batch]:
        """token["advantages"], ["returns"] and ["old_values"] [T]; `rewards`: [n], one an answer.

        Advantages are brought to mean 0 and deviation 1 over the tokens of the whole rollout.
        """
        config, values = self.config, self.engine.values(batches)
        scores = rewards.split([batch.num_segments for batch in batches])
        found = []
        for batch, score_S in zip(batches, scores, strict=True):
            distance_T = distance_from_reference(batch) * batch.trained
            found.append(token_rewards(score_S, distance_T, batch, kl_coef=config.kl_coef))
        if config.whiten_rewards:
            found = self._whiten(found, batches, shift_mean=False)
        pairs = [
            estimate_gae(rewards_T, values_T, batch, gamma=config.gamma, lam=config.lam)
            for rewards_T, values_T, batch in zip(found, values, batches, strict=True)
        ]
        advantages = self._whiten([advantages_T for advantages_T, _ in pairs], batches, shift_mean=True)
        returns = [returns_T.float() for _, returns_T in pairs]
        return [
            replace(
                batch, token={**batch.token, "advantages": a_T.float(), "returns": r_T, "old_values": v_T}
            )
            for batch, a_T, r_T, v_T in zip(batches, advantages, returns, values, strict=True)
        ]

    def _whiten(self, columns: list[Tensor], batches: Sequence[Batch], *, shift_mean: bool) -> list[Tensor]:
        """Trained tokens by the mean and deviation of all of them, on all ranks."""
        mine = [column_T[batch.trained] for column_T, batch in zip(columns, batches, strict=True)]
        every, first = self.engine.gather(torch.cat([torch.zeros(0, dtype=torch.float64), *mine]))
        even = whiten(every, shift_mean=shift_mean)[first : first + sum(map(len, mine))]
        parts = even.split([len(part) for part in mine])
        return [
            torch.zeros_like(column_T).masked_scatter(batch.trained, part)
            for column_T, batch, part in zip(columns, batches, parts, strict=True)
        ]
