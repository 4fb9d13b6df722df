"""SwanLab. Runs in the cloud are found again when they go on; those in files begin a new one."""

import swanlab

from swift.train.trackers import markdown_table
from swift.train.tracking import Rows, Sink, TrackedRun


def open_sink(run: TrackedRun) -> Sink:
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

    def write_table(tag: str, step: int, rows: Rows) -> None:
        opened.log({tag: swanlab.Text(markdown_table(rows))}, step=step)

    return Sink(
        write=lambda step, numbers: opened.log(numbers, step=step),
        write_table=write_table,
        close=lambda finished: swanlab.finish("success" if finished else "aborted"),
    )
