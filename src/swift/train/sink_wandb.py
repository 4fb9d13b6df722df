"""Weights & Biases. Its own variables hold: WANDB_MODE=offline, WANDB_PROJECT, WANDB_API_KEY."""

import uuid

import wandb

from swift.train.tracking import Rows, Sink, TrackedRun

STEP = "step"  # a column of ours: wandb's own count refuses the steps that a resumed run does again


def open_sink(run: TrackedRun) -> Sink:
    identity = run.identity("wandb") or uuid.uuid4().hex
    run.keep_identity("wandb", identity)
    opened = wandb.init(
        project=run.output.project, name=run.name, id=identity, resume="allow", dir=str(run.directory),
        config=run.flags,
    )  # fmt: skip
    opened.define_metric("*", step_metric=STEP)

    def write_table(tag: str, step: int, rows: Rows) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in rows])
        opened.log({tag: table, STEP: step})

    return Sink(
        write=lambda step, numbers: opened.log({**numbers, STEP: step}),
        write_table=write_table,
        close=lambda finished: opened.finish(exit_code=0 if finished else 1),
    )
