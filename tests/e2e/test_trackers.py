"""--report_to, each tracker through its own package and read back with it; skipped where it is missing."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sft import only_run, read_log, sft_command, write_rows

from swift.cli.main import run as run_command
from swift.config.schedule import OutputConfig
from swift.plugins.callbacks import EndEvent, StartEvent, StepEvent
from swift.train.tracking import TrackedRun, Tracking, load_trackers

FLAGS = ("--max_steps", "4", "--save_steps", "2", "--run_name", "first try", "--project", "birds")


def train_and_resume(model, tmp_path, *flags: str) -> list[tuple[int, float]]:
    """A run of four steps that is resumed after the second; what its log says."""
    data = write_rows(tmp_path / "rows.jsonl")
    assert run_command(sft_command(model, data, tmp_path / "out", *FLAGS, *flags)) == 0
    run = only_run(tmp_path / "out")
    assert run_command(["sft", "--resume_from_checkpoint", str(run / "checkpoint-2")]) == 0
    return [(i, row["loss"]) for i, row in enumerate((r for r in read_log(run) if "loss" in r), start=1)]


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_missing_package_is_told_before_the_run(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"swift.train.sink_{name}", raising=False)
    data = write_rows(tmp_path / "rows.jsonl")
    command = sft_command(tmp_path / "no-model", data, tmp_path / "out", "--report_to", name)
    assert run_command(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"--report_to {name} needs a package that is not installed ({name})" in told
    assert f"hint: pip install '{name}" in told


def test_tensorboard_of_a_resumed_run_has_every_step_once(tiny_llama_dir, tmp_path):
    log = train_and_resume(tiny_llama_dir, tmp_path, "--report_to", "tensorboard")
    events = EventAccumulator(str(only_run(tmp_path / "out") / "runs"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in log] and len(points) == 4


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format after a header of 7 bytes.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_keeps_one_run(tiny_llama_dir, tmp_path, monkeypatch):
    """Steps after the checkpoint are done twice, with equal numbers and under the same step."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    log = train_and_resume(tiny_llama_dir, tmp_path, "--report_to", "wandb")
    points, runs = [], set()
    for path in sorted((only_run(tmp_path / "out") / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                runs.add((record.run.run_id, record.run.display_name, record.run.project))
            values = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
            if "train/loss" in values:
                points.append((int(values["step"]), float(values["train/loss"])))
    assert len(runs) == 1 and next(iter(runs))[1:] == ("first try", "birds")
    assert sorted(points) == sorted([*log, *log[2:]])


def test_wandb_shows_answers_in_a_table(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = {"wandb_log_unique_prompts": True}
    (opener,) = load_trackers(["wandb"])
    tracking = Tracking(opener, TrackedRun(tmp_path, OutputConfig(project="birds"), flags))
    tracking.on_start(StartEvent(tmp_path, 0, 1))
    asked = [[{"role": "user", "content": text}] for text in ("one", "one", "two")]
    answers = tuple({"prompt": p, "completion": f"a{i}", "right": i / 2} for i, p in enumerate(asked))
    tracking.on_step(StepEvent(1, 0.5, {"loss": 0.5}, answers=answers))
    tracking.on_end(EndEvent(1, {}, True))
    (table,) = tmp_path.rglob("train/completions*.table.json")
    shown = json.loads(table.read_text())
    assert shown["columns"] == ["prompt", "completion", "right"]
    assert shown["data"] == [["user: one", "a0", 0.0], ["user: two", "a2", 1.0]]


def test_mlflow_keeps_one_run(tiny_llama_dir, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log = train_and_resume(tiny_llama_dir, tmp_path, "--report_to", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("birds").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["lora_rank"]) == (
        "first try",
        "FINISHED",
        "8",
    )
    points = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(set(points)) == log


def test_swanlab_writes_files(tiny_llama_dir, tmp_path):
    pytest.importorskip("swanlab")
    data = write_rows(tmp_path / "rows.jsonl")
    flags = (*FLAGS, "--report_to", "swanlab", "--swanlab_mode", "offline")
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 0
    written = list((only_run(tmp_path / "out") / "swanlog").rglob("*"))
    contents = b"".join(path.read_bytes() for path in written if path.is_file())
    assert b"train/loss" in contents and b"first try" in contents
