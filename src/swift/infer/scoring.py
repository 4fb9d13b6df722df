"""Scores and classes of whole texts: what `swift infer` does with a reward model or a classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import Tensor

from swift.config.data import DataConfig
from swift.config.task import MULTI_LABEL
from swift.data.collate import collate_rows
from swift.data.encode import EncodedDataset, Encoder, encode_rows
from swift.data.types import Row
from swift.engines.transformers.scorer import TextScorer
from swift.utils.files import append_jsonl
from swift.utils.log import console, warn

WRITTEN_TOGETHER = 1000  # rows


def score_rows(scorer: TextScorer, rows: Sequence[Row], path: Path, *, batch_size: int, strict: bool) -> int:
    """Appends one line for each row to `path`, in order: how many were written."""
    problem = scorer.model.config.problem_type
    strategy = scorer.template.config.truncation_strategy
    encoder = Encoder(scorer.template, scorer.max_length, strategy, strict)
    dataset, report = encode_rows(rows, encoder, DataConfig(max_drop_ratio=1.0), what="given")
    if report.dropped:
        warn(f"{report.num_dropped} of {report.total} rows not scored: {report.summary()}")
    starts = range(0, len(dataset), batch_size)
    written: list[dict[str, Any]] = []
    for start in track(starts, "scoring", console=console(), transient=True):
        chosen = range(start, min(start + batch_size, len(dataset)))
        logits_SC = scorer.score_batch(collate_rows(dataset, chosen))
        written += [
            _describe(problem, dataset, i, logits) for i, logits in zip(chosen, logits_SC, strict=True)
        ]
        if len(written) >= WRITTEN_TOGETHER or chosen[-1] == len(dataset) - 1:
            append_jsonl(path, written)
            written = []
    return len(dataset)


def _describe(problem: str | None, dataset: EncodedDataset, index: int, logits_C: Tensor) -> dict[str, Any]:
    """A line of the result: the conversation, and its score or its class."""
    sample = dataset.samples[index]
    line: dict[str, Any] = {"messages": list(sample.messages)}
    if "label" in sample.extra:
        line["labels"] = sample.extra["label"]
    if len(logits_C) == 1:
        return {**line, "score": round(float(logits_C[0]), 6)}
    if problem == MULTI_LABEL:
        probabilities = [round(p, 6) for p in logits_C.sigmoid().tolist()]
        classes = (logits_C > 0).nonzero().flatten().tolist()
        return {**line, "response": str(classes), "probabilities": probabilities}
    probabilities = [round(p, 6) for p in logits_C.softmax(-1).tolist()]
    return {**line, "response": str(int(logits_C.argmax())), "probabilities": probabilities}
