"""Whole texts through a model with a head, or to their embedding, wherever that is asked.

Not here: training of them (engine.py), what becomes of the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swift.batch import Batch
from swift.config.model import ModelConfig
from swift.config.option import ConfigError
from swift.config.template import TemplateConfig
from swift.data.collate import collate
from swift.engines.attention import FLAT_ATTENTION
from swift.engines.transformers.forward import Layout, refusal_of_flat, score
from swift.models.adapters import load_adapter
from swift.models.heads import load_scoring_model
from swift.models.load import context_length, load_model, load_tokenizer, pick_device
from swift.template.chat import ChatTemplate
from swift.template.tokenize import Encoded, Rejected, encode_chats
from swift.template.types import Message

TOKENS_TOGETHER = 16_384


@dataclass(frozen=True)
class TextScorer:
    """A model, and the template that writes conversations for it."""

    model: PreTrainedModel
    template: ChatTemplate
    layout: Layout
    gives: str = "class_logits"  # or "embeddings"

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        num_labels: int | None,
        model: ModelConfig,
        template: TemplateConfig,
        adapter: Path | None = None,
        problem: str | None = None,
        device: torch.device | None = None,
    ) -> "TextScorer":
        """`model`: precision and attention. `device`: none = as `model` says.

        `num_labels`: outputs of the head; None = the embeddings of a language model.
        """
        device = device or pick_device(model.device)
        tokenizer = load_tokenizer(adapter or path)
        loading = {"dtype": model.torch_dtype, "attention": model.attn_impl, "device": device}
        if num_labels is None:
            network = load_model(path, **loading)
        else:
            seed = None if adapter is None else 0  # the adapters bring the head
            network = load_scoring_model(
                path, tokenizer, num_labels=num_labels, seed=seed, problem=problem, **loading
            )
        flat = refusal_of_flat(network, network.config) is None
        if flat:
            network.set_attn_implementation(FLAT_ATTENTION)
        if adapter is not None:
            network = load_adapter(network, adapter, trainable=False)
        chat = ChatTemplate(tokenizer, replace(template, loss_scale="all"))  # whole texts are read
        gives = "embeddings" if num_labels is None else "class_logits"
        return cls(network.eval(), chat, Layout(flat, flat, device), gives)

    @property
    def max_length(self) -> int:
        """Tokens that a text may have."""
        return self.template.config.max_length or context_length(self.model) or 2048

    @torch.inference_mode()
    def score_batch(self, batch: Batch) -> Tensor:
        """[S, C] on the CPU: outputs of the head at the last token of each segment, or what enters it."""
        stats = score(self.model, batch, frozenset({self.gives}), self.layout)
        found: Tensor = getattr(stats, self.gives)
        return found.cpu()

    def encode(self, conversations: Sequence[Sequence[Message]], *, truncation: str) -> list[Encoded]:
        """Tokens; of a conversation that is too long its end, with "delete" an error. Raises ConfigError."""
        rows: list[Encoded] = []
        for row in encode_chats(
            self.template, conversations, max_length=self.max_length, truncation_strategy=truncation
        ):
            if isinstance(row, Rejected):
                raise ConfigError(f"{self.model.name_or_path} cannot read a conversation: {row.reason}")
            rows.append(row)
        return rows

    def score_chats(self, conversations: Sequence[Sequence[Message]]) -> Tensor:
        """[N, C] of conversations, in order; of one that is too long, its end counts. Raises ConfigError."""
        return self.score_rows(self.encode(conversations, truncation="left"))

    def score_rows(self, rows: Sequence[Encoded]) -> Tensor:
        """[N, C] of conversations, in order."""
        together: list[list[Encoded]] = [[]]
        tokens = 0
        for row in rows:
            tokens += len(row.input_ids)
            if together[-1] and tokens > TOKENS_TOGETHER:
                together.append([])
                tokens = len(row.input_ids)
            together[-1].append(row)
        return torch.cat([self.score_batch(collate(some)) for some in together if some])
