"""PPO's two models: the policy, and one that foresees at every token what an answer will be worth.

From what it foresees come the advantages of every token, which PPO learns from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.batch import Batch
from swift.config.option import ConfigError
from swift.config.ppo import PpoConfig
from swift.config.runs import RlhfRun
from swift.engines.protocol import Engine, Snapshot, StepInfo, Sums
from swift.models.hub import resolve_model
from swift.models.load import load_config
from swift.objectives.advantages import estimate_gae, token_rewards, whiten
from swift.objectives.types import Objective
from swift.objectives.value import Value
from swift.train.building import build_engine
from swift.train.preparing import Prepared
from swift.train.scoring import distance_from_reference

VALUE_MODEL = "value_model"  # directory of a checkpoint
VALUES = frozenset({"values"})


class ActorCritic:
    """Both as one engine: whoever trains the policy trains its critic, on the same batches."""

    def __init__(self, actor: Engine, critic: Engine, value: Value) -> None:
        self.actor, self.critic, self.value = actor, critic, value
        pairs = zip(actor.num_parameters, critic.num_parameters, strict=True)
        self.num_parameters: Any = tuple(a + b for a, b in pairs)

    def __getattr__(self, name: str) -> Any:
        """What is not here is asked of the policy alone."""
        return getattr(self.actor, name)

    def values(self, batches: Sequence[Batch]) -> list[Tensor]:
        """[T] of each batch, on the CPU."""
        found = self.critic.forward(batches, VALUES)
        return [stats.values.cpu() for stats in found if stats.values is not None]

    def forward_backward(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        sums = self.actor.forward_backward(batches, objective)
        for name, pair in self.critic.forward_backward(batches, self.value).pairs.items():
            if name.startswith("value/"):  # its loss has a name of its own; tokens are counted once
                sums.add(name, *pair)
        return sums

    def optim_step(self) -> StepInfo:
        self.critic.optim_step()
        return self.actor.optim_step()

    @contextmanager
    def set_aside(self, *, weights: bool, moments: bool) -> Iterator[None]:
        with (
            self.actor.set_aside(weights=weights, moments=moments),
            self.critic.set_aside(weights=weights, moments=moments),
        ):
            yield

    def save(self, path: Path, *, resumable: bool) -> Snapshot:
        """The policy where it always is, the value model in a directory beside it."""
        inner = path / VALUE_MODEL
        inner.mkdir(exist_ok=True)
        both = self.actor.save(path, resumable=resumable), self.critic.save(inner, resumable=resumable)

        def finish() -> None:
            for snapshot in both:
                if snapshot.finish:
                    snapshot.finish()

        size = sum(snapshot.bytes for snapshot in both)
        return Snapshot(size, lambda: [file for snapshot in both for file in snapshot.write()], finish)


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


def build_engines(ready: Prepared, *place: Any, build_one: Callable[..., Engine] = build_engine) -> Engine:
    """The engine of a method; of PPO both, the value model beginning as the reward model or the policy."""
    run, method, resumption = ready.run, ready.method, ready.resumption
    if not (isinstance(run, RlhfRun) and method.foresees):
        return build_one(ready, *place)
    if run.parallel.zero:
        raise ConfigError("--deepspeed does not go with --rlhf_type ppo yet", hint="--fsdp fsdp2")
    names = run.rewards.reward_model
    start = resolve_model(names[0], revision=None, **run.model.hub) if names else ready.model_path
    value = Value(run.ppo.cliprange_value, run.ppo.vf_coef)
    its_own = replace(
        ready,
        method=replace(method, objective=value, num_labels=1, needs_reference=False, mix_every=None),
        model_path=start,
        model_config=load_config(start),
        resumption=resumption and replace(resumption, checkpoint=resumption.checkpoint / VALUE_MODEL),
    )
    critic = build_one(its_own, *place)
    return ActorCritic(build_one(ready, *place), critic, value)
