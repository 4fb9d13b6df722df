"""MLflow. MLFLOW_TRACKING_URI says where to; without it MLflow keeps files where the command runs."""

import mlflow

from swift.train.trackers import markdown_table
from swift.train.tracking import Rows, Sink, TrackedRun

LONGEST_VALUE = 500  # characters of a parameter that every MLflow server takes


def open_sink(run: TrackedRun) -> Sink:
    if run.output.project:
        mlflow.set_experiment(run.output.project)
    identity = run.identity("mlflow")
    opened = mlflow.start_run(run_id=identity, run_name=run.name)
    if not identity:
        run.keep_identity("mlflow", opened.info.run_id)
        mlflow.log_params({k: str(v)[:LONGEST_VALUE] for k, v in run.flags.items()})

    def write(step: int, numbers: dict[str, float]) -> None:
        names = {tag.replace("(", "_").replace(")", ""): value for tag, value in numbers.items()}
        mlflow.log_metrics(names, step=step)

    def write_table(tag: str, step: int, rows: Rows) -> None:
        mlflow.log_text(markdown_table(rows), f"{tag}-{step}.md")

    return Sink(write, write_table, lambda finished: mlflow.end_run("FINISHED" if finished else "KILLED"))
