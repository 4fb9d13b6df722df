"""--teacher_model_server: a teacher behind a port of vLLM's, which tells its most likely tokens.

Owns: the columns teacher_ids and teacher_logps of batches. Not here: how far the student is from them
(objectives/distill.py).
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from swift.batch import Batch
from swift.config.option import ConfigError
from swift.engines.protocol import Engine
from swift.rollout.vllm_client import Server
from swift.train.scoring import Step

AT_ONCE = 32  # rows that a rank asks for together
TIMEOUT_SECONDS = 240.0


class FarTeacher:
    """Asks for all rows of a step: a Scorer. The teacher reads token ids, so it needs the same tokenizer."""

    def __init__(self, url: str, top_k: int) -> None:
        self.top_k, way = top_k, "swift deploy --infer_backend vllm"
        self.server = Server(url, TIMEOUT_SECONDS, kind="teacher server", way=way)
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="teacher")

    @cached_property
    def model(self) -> str:
        """The name by which it is served."""
        return str(self.server.ask("GET", "/v1/models", None, phase="at the start")["data"][0]["id"])

    def check(self, token_ids: list[int], vocabulary: int) -> None:
        """Asks for one row. ConfigError where nobody answers, or tells too little, or of other tokens."""
        told, _ = self._ask(token_ids)
        if int(told.max()) >= vocabulary:
            raise ConfigError(
                f"the teacher server {self.server.place} tells of token {int(told.max())}, and the model has "
                f"{vocabulary}",
                hint="a teacher needs the tokenizer of the model",
            )

    def __call__(self, _engine: Engine, step: Step) -> list[Batch]:
        return [self._tell(batch) for batch in step.batches]

    def _tell(self, batch: Batch) -> Batch:
        rows = batch.input_ids.split(batch.segment_lengths().tolist())
        told = list(self.pool.map(self._ask, (row.tolist() for row in rows)))
        ids_TK, logps_TK = (torch.cat(column) for column in zip(*told, strict=True))
        return replace(batch, token={**batch.token, "teacher_ids": ids_TK, "teacher_logps": logps_TK})

    def _ask(self, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """([t, K] ids, [t, K] log-probabilities) of what follows each token; zeros after the last one."""
        body = {
            "model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0,
            "prompt_logprobs": self.top_k,
        }  # fmt: skip
        answer = self.server.ask("POST", "/v1/completions", body, phase="while the teacher was asked")
        told = answer["choices"][0].get("prompt_logprobs") or []
        if len(told) != len(token_ids):
            raise ConfigError(
                f"the teacher server {self.server.place} tells nothing of a prompt's tokens",
                hint=f"start one with {self.server.way} --max_logprobs {self.top_k}",
            )
        best = [self._most_likely(at) for at in told[1:]]
        best.append([(0.0, 0)] * self.top_k)
        logps = torch.tensor([[logp for logp, _ in at] for at in best])
        return torch.tensor([[token for _, token in at] for at in best]), logps

    def _most_likely(self, at: Mapping[str, Mapping[str, Any]]) -> list[tuple[float, int]]:
        """Among what is told of a place; the prompt's own token is there, however unlikely."""
        found = sorted(((float(told["logprob"]), int(token)) for token, told in at.items()), reverse=True)
        if len(found) < self.top_k:
            raise ConfigError(
                f"the teacher server {self.server.place} tells {len(found)} tokens of a place, not "
                f"{self.top_k}",
                hint=f"--gkd_logits_topk {len(found)}",
            )
        return found[: self.top_k]
