"""Where the steps of a run come from: what is known before the weights load, and what is opened with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swift.data.feed import Feed
from swift.engines.protocol import Engine, Sums
from swift.engines.ranks import Ranks
from swift.train import summary
from swift.train.evaluation import Evaluation, RowEvaluation
from swift.train.online import RolloutFeed
from swift.train.preparing import Prepared, check_rows, make_feed, plan_steps


@dataclass(frozen=True)
class Opened:
    """A stage with its engine."""

    feed: Feed | RolloutFeed
    evaluation: Evaluation | None
    observe: Callable[[float], Sums] | None = None  # see Loop
    answers: Callable[[], tuple[dict[str, Any], ...]] = tuple


class RowStage:
    """Rows that exist, at hand or as a stream. Built by every rank, before the engine."""

    def __init__(self, ready: Prepared, ranks: Ranks) -> None:
        self.ready, self.ranks = ready, ranks
        self.plan = plan_steps(ready, ranks)
        check_rows(ready, self.plan)
        self.feed = make_feed(self.plan, ready)
        self.accumulation = self.plan.accumulation  # micro-batches of an optimizer step
        schedule = ready.run.schedule
        self.total_steps = self.plan.total_steps(schedule.num_train_epochs, schedule.max_steps)

    def identity(self) -> dict[str, Any]:
        """What must be the same where a run goes on, and on every rank."""
        return self.feed.identity()

    def tell(self, *, flat: bool) -> None:
        """Says what will be trained, once."""
        if self.plan.packs:
            summary.tell_packs(self.plan.packs, flat=flat)
        rows = self.ready.rows if self.ready.stream is None else None
        summary.tell_steps(self.plan, self.total_steps, rows, world=self.ranks.world)

    def open(self, engine: Engine) -> Opened:
        ready, run = self.ready, self.ready.run
        if ready.eval_rows is None or run.eval_limit == 0:
            return Opened(self.feed, None)
        shown = summary.show_answers(ready.tokenizer, ready.eval_rows, ready.method.shape)
        size = run.schedule.per_device_eval_batch_size
        evaluation = RowEvaluation(engine, ready.method, ready.eval_rows, size, run.eval_limit, shown)
        return Opened(self.feed, evaluation)
