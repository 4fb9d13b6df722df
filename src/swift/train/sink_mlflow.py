"""MLflow. MLFLOW_TRACKING_URI says where to; without it MLflow keeps files where the command runs."""

from collections.abc import Sequence
from typing import Any

import mlflow

from swift.train.trackers import markdown_table
from swift.train.tracking import SAMPLES_TAG, TrackedRun

LONGEST_VALUE = 500  # characters of a parameter that every MLflow server takes


class MlflowSink:
    def write(self, step: int, numbers: dict[str, float]) -> None:
        names = {tag.replace("(", "_").replace(")", ""): value for tag, value in numbers.items()}
        mlflow.log_metrics(names, step=step)

    def write_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        mlflow.log_text(markdown_table(rows), f"{SAMPLES_TAG}-{step}.md")

    def flush(self) -> None:
        """It writes by itself."""

    def close(self, finished: bool, /) -> None:
        mlflow.end_run("FINISHED" if finished else "KILLED")


def open_sink(run: TrackedRun) -> MlflowSink:
    if run.output.project:
        mlflow.set_experiment(run.output.project)
    identity = run.identity("mlflow")
    opened = mlflow.start_run(run_id=identity, run_name=run.name)
    if not identity:
        run.keep_identity("mlflow", opened.info.run_id)
        mlflow.log_params({k: str(v)[:LONGEST_VALUE] for k, v in run.flags.items()})
    return MlflowSink()
