"""Weights & Biases. Its own variables hold: WANDB_MODE=offline, WANDB_PROJECT, WANDB_API_KEY."""

import uuid
from collections.abc import Sequence
from typing import Any

import wandb

from swift.train.tracking import SAMPLES_TAG, TrackedRun

STEP = "step"


class WandbSink:
    """Steps are a column of ours: wandb's own count refuses the steps that a resumed run does again."""

    def __init__(self, run: wandb.Run) -> None:
        self.run = run
        run.define_metric("*", step_metric=STEP)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({**numbers, STEP: step})

    def write_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in rows])
        self.run.log({SAMPLES_TAG: table, STEP: step})

    def flush(self) -> None:
        """It writes by itself."""

    def close(self, finished: bool, /) -> None:
        self.run.finish(exit_code=0 if finished else 1)


def open_sink(run: TrackedRun) -> WandbSink:
    identity = run.identity("wandb") or uuid.uuid4().hex
    run.keep_identity("wandb", identity)
    opened = wandb.init(
        project=run.output.project, name=run.name, id=identity, resume="allow", dir=str(run.directory),
        config=run.flags,
    )  # fmt: skip
    return WandbSink(opened)
