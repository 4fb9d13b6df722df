"""Distillation's rows: those of the data, or in some steps the student's own answers to their prompts."""

from dataclasses import dataclass, replace

import numpy as np

from swift.batch import IGNORED, Batch
from swift.config.online import OnlineConfig
from swift.config.runs import RlhfRun
from swift.data.feed import StoredFeed
from swift.engines.protocol import Engine
from swift.engines.ranks import Ranks
from swift.rollout.protocol import RolloutEngine
from swift.rollout.types import Request
from swift.train.answers import Answered, collate_answers, sampling_of
from swift.train.far_teacher import FarTeacher
from swift.train.preparing import Prepared
from swift.train.rollouts import check_answers, start_answers
from swift.train.scoring import with_constant
from swift.train.stage import Opened, RowStage

ORIGIN = "sampled"  # of a segment: 1 for the student's own answers


@dataclass(frozen=True)
class DistillFeed(StoredFeed):
    """As StoredFeed; in a step of the student's own, each row keeps its prompt and loses its answer.

    A row's prompt is everything before its first trained token. Source: arXiv:2306.13649 algorithm 1.
    """

    engine: Engine
    rollout: RolloutEngine
    config: OnlineConfig
    share: float  # of steps that are the student's own
    seed: int

    def is_own(self, step: int) -> bool:
        """The same on every rank."""
        return float(np.random.RandomState([self.seed % 2**32, step]).rand()) < self.share

    def batches(self, step: int, data_rank: int, /) -> list[Batch]:
        if not self.is_own(step):
            return with_constant(StoredFeed.batches(self, step, data_rank), ORIGIN, 0.0)
        parts = self.plan.micro_batches(step, data_rank)
        requests = [self._request(int(row), step) for numbers in parts for row in numbers]
        self.rollout.wake()
        self.rollout.update_weights(self.engine.weights(), version=step)
        answers = self.rollout.generate(requests)
        self.rollout.sleep()
        said = iter(
            Answered(0, 0, request.token_ids, one.token_ids, one.logps, one.finish_reason, one.text)
            for request, (one,) in zip(requests, answers, strict=True)
        )
        batches = [collate_answers([next(said) for _ in numbers], False) for numbers in parts]
        return with_constant(batches, ORIGIN, 1.0)

    def _request(self, row: int, step: int) -> Request:
        encoded = self.rows.sequences(row)[0]
        start = int(np.argmax(encoded.labels != IGNORED))
        seed = np.random.SeedSequence([self.seed % 2**32, step, row]).generate_state(1)
        return Request(encoded.input_ids[:start].tolist(), sampling_of(self.config, int(seed[0])))

    def close(self) -> None:
        self.rollout.close()


class DistillStage(RowStage):
    """Rows with answers, and somebody who gives others."""

    def __init__(self, ready: Prepared, ranks: Ranks) -> None:
        assert isinstance(ready.run, RlhfRun)
        self.run = ready.run
        if self.run.rlhf.lmbda:
            check_answers(self.run, ready)
        if isinstance(ready.method.score, FarTeacher):
            first = ready.rows.sequences(0)[0].input_ids.tolist()
            ready.method.score.check(first, ready.model_config.get_text_config().vocab_size)
        RowStage.__init__(self, ready, ranks)

    def open(self, engine: Engine) -> Opened:
        opened = RowStage.open(self, engine)
        run, ready = self.run, self.ready
        if run.rlhf.lmbda == 0:
            return opened
        assert ready.stream is None, "prepare has refused it"
        longest = int(ready.rows.lengths.max()) + run.online.max_completion_length
        feed = DistillFeed(
            ready.rows, self.plan, engine, start_answers(run, ready, engine, self.ranks, longest),
            run.online, run.rlhf.lmbda, run.schedule.seed,
        )  # fmt: skip
        return replace(opened, feed=feed)
