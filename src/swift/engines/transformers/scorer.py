"""Whole texts through a model with a head: reward models and classifiers, wherever they are asked.

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
from swift.engines.transformers.attention import FLAT_ATTENTION
from swift.engines.transformers.forward import Layout, refusal_of_flat, score
from swift.models.adapters import load_adapter
from swift.models.heads import load_scoring_model
from swift.models.load import context_length, load_tokenizer, pick_device
from swift.template.chat import ChatTemplate
from swift.template.tokenize import Encoded, Rejected, encode_chats
from swift.template.types import Message

TOKENS_TOGETHER = 16_384


@dataclass(frozen=True)
class TextScorer:
    """A model with a head, and the template that writes conversations for it."""

    model: PreTrainedModel
    template: ChatTemplate
    layout: Layout

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        num_labels: int,
        model: ModelConfig,
        template: TemplateConfig,
        adapter: Path | None = None,
        problem: str | None = None,
        device: torch.device | None = None,
    ) -> "TextScorer":
        """`model`: precision and attention. `device`: none = as `model` says."""
        device = device or pick_device(model.device)
        tokenizer = load_tokenizer(adapter or path)
        network = load_scoring_model(
            path, tokenizer, num_labels=num_labels,
            seed=None if adapter is None else 0,  # the adapters bring the head
            problem=problem, dtype=model.torch_dtype, attention=model.attn_impl, device=device,
        )  # fmt: skip
        flat = refusal_of_flat(network, network.config) is None
        if flat:
            network.set_attn_implementation(FLAT_ATTENTION)
        if adapter is not None:
            network = load_adapter(network, adapter, trainable=False)
        chat = ChatTemplate(tokenizer, replace(template, loss_scale="all"))  # whole texts are read
        return cls(network.eval(), chat, Layout(flat, flat, device))

    @property
    def max_length(self) -> int:
        """Tokens that a text may have."""
        return self.template.config.max_length or context_length(self.model) or 2048

    @torch.inference_mode()
    def score_batch(self, batch: Batch) -> Tensor:
        """[S, C] on the CPU: outputs of the head at the last token of each segment."""
        found = score(self.model, batch, frozenset({"class_logits"}), self.layout).class_logits
        assert found is not None
        return found.cpu()

    def score_chats(self, conversations: Sequence[Sequence[Message]]) -> Tensor:
        """[N, C] of conversations, in order; of one that is too long, its end counts. Raises ConfigError."""
        rows = encode_chats(
            self.template, conversations, max_length=self.max_length, truncation_strategy="left"
        )
        together: list[list[Encoded]] = [[]]
        tokens = 0
        for row in rows:
            if isinstance(row, Rejected):
                raise ConfigError(f"{self.model.name_or_path} cannot read a conversation: {row.reason}")
            tokens += len(row.input_ids)
            if together[-1] and tokens > TOKENS_TOGETHER:
                together.append([])
                tokens = len(row.input_ids)
            together[-1].append(row)
        return torch.cat([self.score_batch(collate(some)) for some in together if some])
