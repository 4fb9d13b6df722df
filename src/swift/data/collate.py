"""Encoded rows -> `Batch`. The only place where labels are shifted."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from swift.batch import IGNORED, Batch
from swift.data.encode import EncodedDataset, concatenate
from swift.template.tokenize import Encoded


def shift_left(values: np.ndarray, fill: float) -> np.ndarray:
    """values[t + 1] at t, `fill` at the end: what the model predicts at each position."""
    return np.append(values[1:], np.asarray([fill], dtype=values.dtype))


def collate_rows(dataset: EncodedDataset, indices: Sequence[int] | np.ndarray) -> Batch:
    """The rows of these numbers as one flat batch, with what is known about each row and position."""
    sequences, counts, spans = [], [], []
    for index in indices:
        found = dataset.sequences(index)
        sequences += found
        counts.append(len(found))
        end = int(dataset.offsets[index + 1])
        spans.append((end - int(dataset.lengths[index]), end))
    chosen = np.asarray(indices, dtype=np.int64)
    segment = {
        name: torch.from_numpy(np.repeat(values[chosen], counts, axis=0))
        for name, values in dataset.values.items()
    }
    for name, by_place in dataset.by_place:
        numbers = [by_place[min(i, len(by_place) - 1)] for count in counts for i in range(count)]
        segment[name] = torch.tensor(numbers, dtype=torch.float32)
    token = {
        name: torch.from_numpy(np.concatenate([values[first:end] for first, end in spans]))
        for name, values in dataset.tokens.items()
    }
    batch = collate(sequences)
    return replace(batch, token={**batch.token, **token}, segment=segment)


def collate(rows: Sequence[Encoded]) -> Batch:
    """One flat batch, a segment a sequence, in the given order. Weights appear only where some have them."""
    input_ids = np.concatenate([r.input_ids for r in rows])
    labels = np.concatenate([shift_left(r.labels, IGNORED) for r in rows])
    segment_ids = np.repeat(np.arange(len(rows)), [len(r.input_ids) for r in rows])
    token = {}
    if any(r.loss_scale is not None for r in rows):
        weights = [np.ones(len(r.labels), np.float32) if r.loss_scale is None else r.loss_scale for r in rows]
        token["loss_scale"] = torch.from_numpy(np.concatenate([shift_left(w, 0.0) for w in weights]))
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        segment_ids=torch.from_numpy(segment_ids.astype(np.int64)),
        num_segments=len(rows),
        token=token,
    )


def mismatch_rows(
    dataset: EncodedDataset, micro_batches: Sequence[Sequence[int] | np.ndarray], order: np.ndarray
) -> list[Batch]:
    """The same micro-batches, each row with the answer of the row before it in `order`.

    `order`: all rows that are scored together, on any rank; the first one follows the last.
    """
    before = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [collate([_mismatch(dataset[i], dataset[before[i]]) for i in chosen]) for chosen in micro_batches]


def _mismatch(prompt: Encoded, answer: Encoded) -> Encoded:
    trained = [int(np.argmax(row.labels != IGNORED)) for row in (prompt, answer)]
    head, tail = prompt.cut(0, trained[0]), answer.cut(trained[1], len(answer.labels))
    return replace(concatenate([head, tail]), loss_scale=None)
