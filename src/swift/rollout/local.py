"""Answers from the model in training itself: no second copy, no weights to send, nothing to install."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from swift.engines.protocol import Engine
from swift.rollout.cache import spare_bytes
from swift.rollout.decoder import Decoder
from swift.rollout.types import Completion, Request


class LocalRollout:
    """Implements `swift.rollout.protocol.RolloutEngine` over a training engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int],
        context: int,
        max_rows: int,
    ) -> None:
        """`context`: tokens of prompt and answer. `max_rows`: answers that each rank computes together."""
        self.engine, self.tokenizer = engine, tokenizer
        self.stop_token_ids, self.context, self.max_rows = tuple(stop_token_ids), context, max_rows
        self.version = 0

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """As the protocol says; a rank without requests waits for nobody, but has to call."""
        with self.engine.generating() as model:
            decoder = Decoder(
                model, self.tokenizer, stop_token_ids=self.stop_token_ids, context=self.context,
                max_rows=self.max_rows, version=self.version,
                memory_bytes=spare_bytes(self.engine.device),
            )  # fmt: skip
            found = decoder.generate(requests)
            decoder.reset()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()  # else training would cut up what the next answers need in one piece
        return found

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:  # noqa: ARG002
        """Takes nothing, and computes nothing: the weights are the engine's own."""
        self.version = version

    def sleep(self) -> None:
        """Keys and values are gone with the last answer already."""

    def wake(self) -> None:
        """There is nothing to undo."""

    def close(self) -> None:
        """There is nothing to end."""
