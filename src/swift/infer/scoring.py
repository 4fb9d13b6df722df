"""Scores and classes of whole texts: what `swift infer` does with a reward model or a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from swift.config.data import DataConfig
from swift.config.runs import InferRun
from swift.config.task import MULTI_LABEL
from swift.data.collate import collate_rows
from swift.data.encode import EncodedDataset, encode_rows
from swift.data.types import Row
from swift.engines.transformers.attention import FLAT_ATTENTION
from swift.engines.transformers.forward import Layout, refusal_of_flat, score
from swift.models.adapters import load_adapter
from swift.models.heads import load_scoring_model
from swift.models.load import context_length, load_tokenizer, pick_device
from swift.template.chat import ChatTemplate
from swift.utils.files import append_jsonl
from swift.utils.log import console, warn

WRITTEN_TOGETHER = 1000  # rows


@dataclass(frozen=True)
class TextScorer:
    """A model with a head, and the template that writes conversations for it."""

    model: PreTrainedModel
    template: ChatTemplate
    layout: Layout

    @classmethod
    def load(
        cls, model_path: Path, adapter: Path | None, num_labels: int, problem: str | None, run: InferRun
    ) -> "TextScorer":
        device = pick_device(run.model.device)
        tokenizer = load_tokenizer(adapter or model_path)
        model = load_scoring_model(
            model_path, tokenizer, num_labels=num_labels,
            seed=None if adapter is None else 0,  # the adapters bring the head
            problem=problem,
            dtype=run.model.torch_dtype, attention=run.model.attn_impl, device=device,
        )  # fmt: skip
        flat = refusal_of_flat(model, model.config) is None
        if flat:
            model.set_attn_implementation(FLAT_ATTENTION)
        if adapter is not None:
            model = load_adapter(model, adapter, trainable=False)
        template = ChatTemplate(tokenizer, replace(run.template, loss_scale="all"))  # whole texts are read
        return cls(model.eval(), template, Layout(flat, flat, device))

    def score_rows(self, rows: Sequence[Row], path: Path, *, batch_size: int, strict: bool) -> int:
        """Appends one line for each row to `path`, in order: how many were written."""
        config = DataConfig(strict=strict, max_drop_ratio=1.0)
        dataset, report = encode_rows(
            rows, self.template, config=config, template_config=self.template.config, what="given",
            max_length=self.template.config.max_length or context_length(self.model) or 2048,
        )  # fmt: skip
        if report.dropped:
            warn(f"{report.num_dropped} of {report.total} rows not scored: {report.summary()}")
        starts = range(0, len(dataset), batch_size)
        written: list[dict[str, Any]] = []
        for start in track(starts, "scoring", console=console(), transient=True):
            chosen = range(start, min(start + batch_size, len(dataset)))
            logits_SC = self.score_batch(dataset, chosen)
            written += [
                self._describe(dataset, i, logits) for i, logits in zip(chosen, logits_SC, strict=True)
            ]
            if len(written) >= WRITTEN_TOGETHER or chosen[-1] == len(dataset) - 1:
                append_jsonl(path, written)
                written = []
        return len(dataset)

    @torch.inference_mode()
    def score_batch(self, dataset: EncodedDataset, rows: range) -> Tensor:
        """[S, C] on the CPU: outputs of the head at the last token of each row."""
        batch = collate_rows(dataset, rows)
        found = score(self.model, batch, frozenset({"class_logits"}), self.layout).class_logits
        assert found is not None
        return found.cpu()

    def _describe(self, dataset: EncodedDataset, index: int, logits_C: Tensor) -> dict[str, Any]:
        """A line of the result: the conversation, and its score or its class."""
        sample = dataset.samples[index]
        line: dict[str, Any] = {"messages": list(sample.messages)}
        if "label" in sample.extra:
            line["labels"] = sample.extra["label"]
        if len(logits_C) == 1:
            return {**line, "score": round(float(logits_C[0]), 6)}
        if self.model.config.problem_type == MULTI_LABEL:
            probabilities = [round(p, 6) for p in logits_C.sigmoid().tolist()]
            classes = (logits_C > 0).nonzero().flatten().tolist()
            return {**line, "response": str(classes), "probabilities": probabilities}
        probabilities = [round(p, 6) for p in logits_C.softmax(-1).tolist()]
        return {**line, "response": str(int(logits_C.argmax())), "probabilities": probabilities}
