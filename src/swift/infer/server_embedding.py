"""`swift deploy` of models of --task_type embedding: /v1/embeddings.

Owns: the answers, and that requests are read one after the other. Not here: HTTP (server.py), what a request
may say (openai_requests.py), the model (engines/transformers/scorer.py).
"""

import asyncio
import base64
from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from swift.config.option import ConfigError
from swift.config.serve import ServeOptions
from swift.engines.transformers.scorer import TextScorer
from swift.infer.openai_requests import ApiError, EmbeddingRequest
from swift.infer.server import find_model


class EmbeddingServer:
    """Implements `swift.infer.server.Serving`, and is its own service: one request is read at a time."""

    def __init__(self, name: str, scorer: TextScorer, options: ServeOptions) -> None:
        self.models, self.service, self.options = {name: scorer}, self, options
        self.routes = {"/v1/embeddings": self.embed}
        self.is_open = True
        self.num_running = self.num_waiting = 0  # texts
        self.totals: defaultdict[str, float] = defaultdict(float)
        self.turn = asyncio.Lock()

    async def embed(self, body: EmbeddingRequest) -> dict[str, Any]:
        """/v1/embeddings: vectors of length 1, whose products are the cosines that were trained."""
        scorer, conversations = find_model(self.models, body.model), body.conversations
        count = len(conversations)
        if not self.is_open:
            raise ApiError(503, "the server is shutting down")
        if self.num_waiting + count > self.options.max_batch_size + self.options.max_queue_size:
            self.totals["requests_refused"] += 1
            raise ApiError(429, "too many texts are waiting, try again later")
        self.totals["requests"] += 1
        self.num_waiting += count
        try:
            async with self.turn:
                rows = await asyncio.to_thread(scorer.encode, conversations, truncation="delete")
                vectors = normalize(await asyncio.to_thread(scorer.score_rows, rows), dim=-1)
        except ConfigError as error:
            raise ApiError(400, f"a text is {error.message.partition(': ')[2]}", param="input") from error
        finally:
            self.num_waiting -= count
        tokens = sum(len(row.input_ids) for row in rows)
        self.totals["prompt_tokens"] += tokens
        self.totals["requests_answered"] += 1
        write = pack if body.encoding_format == "base64" else Tensor.tolist
        data = [{"object": "embedding", "index": i, "embedding": write(row)} for i, row in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body.model, "usage": usage}

    def drain(self, _grace_seconds: float) -> None:
        """Takes nothing more."""
        self.is_open = False

    def close(self) -> None:
        """Nothing is left running."""


def pack(vector: Tensor) -> str:
    """As OpenAI's clients ask for it: float32, the lowest byte first, in base64."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
