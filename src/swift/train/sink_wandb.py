"""Weights & Biases. Its own variables hold: WANDB_MODE=offline, WANDB_PROJECT, WANDB_API_KEY."""

import uuid

import wandb

from swift.train.tracking import TrackedRun

STEP = "step"


class WandbSink:
    """Steps are a column of ours: wandb's own count refuses the steps that a resumed run does again."""

    def __init__(self, run: wandb.Run) -> None:
        self.run = run
        run.define_metric("*", step_metric=STEP)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({**numbers, STEP: step})

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
