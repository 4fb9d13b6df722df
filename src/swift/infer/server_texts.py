"""`swift deploy` of models of --task_type embedding: /v1/embeddings.

Owns: the answers, and that requests are read one after the other. Not here: HTTP (server.py), what a request
may say (openai_requests.py), the model (engines/transformers/scorer.py).
"""

import asyncio
import base64
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from swift.config.option import ConfigError
from swift.config.serve import ServeOptions
from swift.engines.transformers.scorer import TextScorer
from swift.infer.openai_requests import ApiError, EmbeddingRequest
from swift.infer.server import find_model
from swift.template.types import Message


class TextService:
    """Reads the texts of one request at a time, in a thread."""

    def __init__(self, scorer: TextScorer, *, limit: int) -> None:
        self.scorer, self.limit = scorer, limit
        self.is_open = True
        self.num_running = self.num_waiting = 0  # texts
        self.totals: defaultdict[str, float] = defaultdict(float)
        self.turn = asyncio.Lock()

    async def read(self, conversations: Sequence[Sequence[Message]]) -> tuple[Tensor, int]:
        """[N, C], and the tokens that were read. Raises ApiError."""
        count = len(conversations)
        if not self.is_open:
            raise ApiError(503, "the server is shutting down")
        if self.num_running + self.num_waiting + count > self.limit:
            self.totals["requests_refused"] += 1
            raise ApiError(429, "too many texts are waiting, try again later")
        self.totals["requests"] += 1
        self.num_waiting += count
        try:
            async with self.turn:
                rows = await asyncio.to_thread(self.scorer.encode, conversations, truncation="delete")
                found = await asyncio.to_thread(self.scorer.score_rows, rows)
        except ConfigError as error:
            raise ApiError(400, f"a text is {error.message.partition(': ')[2]}") from error
        finally:
            self.num_waiting -= count
        tokens = sum(len(row.input_ids) for row in rows)
        self.totals["prompt_tokens"] += tokens
        self.totals["requests_answered"] += 1
        return found, tokens

    def drain(self, _grace_seconds: float) -> None:
        """Takes nothing more."""
        self.is_open = False

    def close(self) -> None:
        """Nothing is left running."""


class TextServer:
    """What the routes share; implements `swift.infer.server.Serving`."""

    def __init__(self, name: str, service: TextService, options: ServeOptions) -> None:
        self.models = {name: service}
        self.service, self.options = service, options
        self.routes = {"/v1/embeddings": self.embed}

    async def embed(self, body: EmbeddingRequest) -> dict[str, Any]:
        """/v1/embeddings: vectors of length 1, whose products are the cosines that were trained."""
        vectors, tokens = await find_model(self.models, body.model).read(body.conversations)
        rows = normalize(vectors.float(), dim=-1)
        data = [
            {
                "object": "embedding", "index": i,
                "embedding": base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
                if body.encoding_format == "base64" else row.tolist(),
            }
            for i, row in enumerate(rows)
        ]  # fmt: skip
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body.model, "usage": usage}
