"""SwanLab. Runs in the cloud are found again when they go on; those in files begin a new one."""

from collections.abc import Sequence
from typing import Any

import swanlab

from swift.train.trackers import markdown_table
from swift.train.tracking import SAMPLES_TAG, TrackedRun


class SwanlabSink:
    def __init__(self, run: swanlab.Run) -> None:
        self.run = run

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def write_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        self.run.log({SAMPLES_TAG: swanlab.Text(markdown_table(rows))}, step=step)

    def flush(self) -> None:
        """It writes by itself."""

    def close(self, finished: bool, /) -> None:
        swanlab.finish("success" if finished else "aborted")


def open_sink(run: TrackedRun) -> SwanlabSink:
    output = run.output
    if output.swanlab_token:
        swanlab.login(api_key=output.swanlab_token)
    is_cloud = output.swanlab_mode == "cloud"  # the default of every version, which have other words for it
    identity = run.identity("swanlab") if is_cloud else None
    opened = swanlab.init(
        project=output.project, workspace=output.swanlab_workspace, name=run.name, config=run.flags,
        mode=None if is_cloud else output.swanlab_mode, log_dir=str(run.directory / "swanlog"),
        id=identity, resume="allow" if identity else None,
    )  # fmt: skip
    if is_cloud and not identity:
        run.keep_identity("swanlab", opened.id)
    return SwanlabSink(opened)
