"""Answers that a scheduler continues, on every process alike.

Owns: how long conversations may get; a scheduler that fails on one process ends all of them. Not here:
the turns themselves (rollout/multi_turn.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.config.option import ConfigError
from swift.engines.ranks import Ranks
from swift.plugins.turns import MultiTurnScheduler
from swift.rollout.multi_turn import Start, Trajectory, run_turns
from swift.rollout.protocol import RolloutEngine
from swift.rollout.types import Sampling
from swift.template.chat import ChatTemplate

USUAL_TURNS = 8  # where --max_turns does not say
LEAST_TOLD = 256  # tokens of what stands between two answers


@dataclass(frozen=True)
class Conversations:
    """A scheduler, and what its turns need."""

    scheduler: MultiTurnScheduler
    name: str
    template: ChatTemplate
    context: int  # tokens of a whole conversation
    timeout_seconds: float

    def run(
        self, rollout: RolloutEngine, starts: Sequence[Start], sampling: Sampling, ranks: Ranks
    ) -> list[Trajectory]:
        """Every rank calls it. Raises ConfigError on all of them when a scheduler fails on one."""
        told: list[ConfigError] = []

        def any_rank(here: bool) -> bool:
            found: list[Any] = ranks.collect(here)
            told.extend(one for one in found if isinstance(one, ConfigError))
            if told:
                raise told[0]
            return any(found)

        try:
            return run_turns(
                rollout, starts, scheduler=self.scheduler, name=self.name, template=self.template,
                sampling=sampling, context=self.context, timeout_seconds=self.timeout_seconds,
                any_rank=any_rank,
            )  # fmt: skip
        except ConfigError as error:
            if not told:
                ranks.collect(error)  # the others are asked whether they go on, or what rewards were worth
            raise


def plan_context(longest: int, *, answer: int, turns: int | None, limit: int | None) -> int:
    """Tokens of a conversation that begins with up to `longest`: each answer, and as much between two."""
    turns = turns or USUAL_TURNS
    return min(longest + turns * answer + (turns - 1) * max(answer, LEAST_TOLD), limit or 2**31)
