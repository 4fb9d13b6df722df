"""Encoded rows -> `Batch`. The only place where labels are shifted."""

from collections.abc import Sequence

import numpy as np
import torch

from swift.batch import IGNORED, Batch
from swift.template.tokenize import Encoded


def shift_left(values: np.ndarray, fill: float) -> np.ndarray:
    """values[t + 1] at t, `fill` at the end: what the model predicts at each position."""
    return np.append(values[1:], np.asarray([fill], dtype=values.dtype))


def collate(rows: Sequence[Encoded]) -> Batch:
    """One flat batch, a segment a row, in the given order. Weights appear only where some row has them."""
    input_ids = np.concatenate([r.input_ids for r in rows])
    labels = np.concatenate([shift_left(r.labels, IGNORED) for r in rows])
    segment_ids = np.repeat(np.arange(len(rows)), [len(r.input_ids) for r in rows])
    token = {}
    if any(r.loss_scale is not None for r in rows):
        weights = [np.ones(len(r.labels), np.float32) if r.loss_scale is None else r.loss_scale for r in rows]
        token["loss_scale"] = torch.from_numpy(np.concatenate([shift_left(w, 0.0) for w in weights]))
    channels = [-1 if r.channel is None else r.channel for r in rows]
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        segment_ids=torch.from_numpy(segment_ids.astype(np.int64)),
        num_segments=len(rows),
        token=token,
        segment={"channel": torch.tensor(channels)} if max(channels) >= 0 else {},
    )
