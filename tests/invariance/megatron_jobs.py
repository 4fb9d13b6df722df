"""What runs in every rank of a job on megatron-core: cases that differ in their layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from swift.batch import IGNORED
from swift.config.layout import Layout
from swift.data.collate import collate
from swift.engines.megatron.engine import MegatronEngine
from swift.engines.megatron.setup import join_model_parallel, leave_model_parallel
from swift.engines.ranks import Ranks, join_peers
from swift.models.load import load_config, load_tokenizer
from swift.rollout.replica import ReplicaRollout, SharedRollout
from swift.rollout.types import Request, Sampling
from swift.template.tokenize import Encoded


def run_each(
    rank: int,
    world: int,
    cases: list[dict[str, Any]],
    run_case: Callable[[Ranks, Layout, dict[str, Any]], None],
) -> None:
    """Every case on the same processes, one after the other."""
    torch.set_num_threads(1)
    for case in cases:
        layout = Layout(world=world, **case["degrees"])
        if not dist.is_initialized() and world > 1:
            dist.init_process_group("gloo")
        ranks = join_model_parallel(Ranks(rank, world), layout, 60)
        try:
            run_case(ranks, layout, case)
        finally:
            leave_model_parallel()


class Answers:
    """Answers of a copy of the model, whose log-probabilities are those of the engine that trains it."""

    def __init__(self, engine: MegatronEngine, model: Path, temperature: float) -> None:
        copy = ReplicaRollout(
            load_config(model), load_tokenizer(model), dtype=engine.dtype, device=engine.device,
            stop_token_ids=[2], context=64, max_rows=4,
        )  # fmt: skip
        self.engine, self.rollout, self.version = engine, SharedRollout(copy, join_peers(engine.ranks)), 0
        self.requests = [
            Request([5 + i, 17, 40 + i, 9] * (1 + 2 * i), Sampling(6, temperature, seed=i), count=3 - i)
            for i in range(2)
        ]

    def check(self) -> list[list[int]]:
        """With the weights as they are now; the tokens, the same on ranks that share their rows."""
        self.version += 1
        self.rollout.wake()
        self.rollout.update_weights(self.engine.weights(), version=self.version)
        found = self.rollout.generate(self.requests)
        self.rollout.sleep()
        rows = []
        for request, answers in zip(self.requests, found, strict=True):
            assert [answer.version for answer in answers] == [self.version] * request.count
            for answer in answers:
                ids = np.array([*request.token_ids, *answer.token_ids], dtype=np.int32)
                hidden = np.arange(len(ids)) < len(request.token_ids)
                rows.append(Encoded(ids, np.where(hidden, IGNORED, ids), None))
        batch = collate(rows)
        (stats,) = self.engine.forward([batch], frozenset({"logps"}))
        told = torch.tensor([logp for answers in found for answer in answers for logp in answer.logps])
        torch.testing.assert_close(told, stats.logps[batch.trained], atol=1e-5, rtol=0)
        return [answer.token_ids for answers in found for answer in answers]
