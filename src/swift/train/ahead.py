"""--async_generate: answers to the next rollout, given while this one is learnt from.

Whoever answers must be somewhere else, so that it holds weights of its own; they stay as they are until the
last answer is there (`wait`), so that a run that goes on has the same answers.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from swift.train.answers import Answered


class Ahead:
    """The answers of this rank to the rollout after the one at hand. Called by all ranks alike."""

    def __init__(
        self, ask: Callable[[int], list[Answered]], rollouts: int, kept: list[dict[str, Any]] | None = None
    ) -> None:
        """`ask`: number of a rollout, below `rollouts`, to answers. `kept`: a checkpoint's, of all ranks."""
        self.ask, self.rollouts, self._kept = ask, rollouts, kept
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._started: Future[list[Answered]] | None = None

    def start(self, number: int) -> None:
        """Begins with this rollout, unless it is behind the last one; the answers before it are forgotten."""
        self._kept = None
        self._started = self._pool.submit(self.ask, number) if number < self.rollouts else None

    def wait(self) -> None:
        """Until nobody is being answered; raises what went wrong."""
        if self._started:
            self._started.result()

    def share(self, rank: int, world: int) -> list[Answered] | None:
        """The part of data rank `rank` of the answers that were begun with; None where none were."""
        if self._kept is not None:
            mine = np.array_split(np.arange(len(self._kept)), world)[rank]
            return [Answered(**self._kept[i]) for i in mine]
        return self._started.result() if self._started else None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
