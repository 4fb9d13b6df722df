"""What takes part in a run beside the loop: users' callbacks, early stopping, the profiler."""

import gzip
import json
from pathlib import Path

import pytest
from test_sft import only_run, read_log, sft_command, write_rows

from swift.cli.main import run as run_command
from swift.plugins.callbacks import callbacks_map, extra_callbacks

OWN = """
from swift.plugin import Callback, Save, Stop, callbacks_map

@callbacks_map.register("three steps")
class ThreeSteps(Callback):
    def on_step(self, event):
        if event.step == 2:
            return Save()
        if event.step == 3:
            return Stop("that will do")
"""
THEIRS = """
from transformers import TrainerCallback
from swift.plugin import extra_callbacks

class Recorder(TrainerCallback):
    heard = []
    def on_train_begin(self, args, state, control, **kwargs):
        self.heard.append(("begin", state.global_step, state.max_steps, args.learning_rate))
    def on_step_end(self, args, state, control, **kwargs):
        self.heard.append(("step", state.global_step, state.epoch))
        control.should_save = state.global_step == 1
        control.should_training_stop = state.global_step == 2
    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append(("log", state.global_step, sorted(logs)[:1]))
    def on_save(self, args, state, control, **kwargs):
        self.heard.append(("save", state.global_step))
    def on_train_end(self, args, state, control, **kwargs):
        self.heard.append(("end", len(state.log_history)))

extra_callbacks.append(Recorder())
"""
UNHEARD = """
from transformers import TrainerCallback
from swift.plugin import extra_callbacks

class Counter(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        pass

extra_callbacks.append(Counter())
"""


@pytest.fixture(autouse=True)
def no_callbacks_stay(monkeypatch):
    yield
    callbacks_map.clear()
    extra_callbacks.clear()


def plugin(tmp_path: Path, name: str, source: str) -> tuple[str, str]:
    (tmp_path / f"{name}.py").write_text(source)
    return "--external_plugins", str(tmp_path / f"{name}.py")


def saved(run: Path) -> list[str]:
    return sorted(p.name for p in run.glob("checkpoint-*"))


def test_a_callback_saves_and_stops(tiny_llama_dir, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl")
    flags = (*plugin(tmp_path, "own_callback", OWN), "--callbacks", "three steps")
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 0
    run = only_run(tmp_path / "out")
    assert saved(run) == ["checkpoint-2", "checkpoint-3"]
    assert read_log(run)[-1]["global_step"] == 3
    assert "stopped after step 3: that will do" in capsys.readouterr().err


def test_callbacks_of_transformers_are_heard_and_followed(tiny_llama_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    flags = plugin(tmp_path, "their_callback", THEIRS)
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 0
    assert saved(only_run(tmp_path / "out")) == ["checkpoint-1", "checkpoint-2"]
    log = ["elapsed_time"]
    heard = extra_callbacks[0].heard
    assert [event for event in heard if event[0] == "save"] == [("save", 1), ("save", 2)]  # when it is whole
    assert [event for event in heard if event[0] != "save"] == [
        ("begin", 0, 18, 0.005),
        ("step", 1, 0.166667), ("log", 1, log),
        ("step", 2, 0.333333), ("log", 2, log),
        ("end", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "source", "flags", "message"),
    [
        ("unheard", UNHEARD, (), "the callback Counter waits for on_substep_end, which is not called here"),
        ("typo", OWN, ("--callbacks", "three step"), "no callback is called three step"),
        ("number", "five = 5", ("--callbacks", "{file}:five"), "int is not a callback"),
        ("profile", "", ("--profile_steps", "4:3"), "--profile_steps 4:3 is not FIRST:LAST"),
        ("early", "", ("--early_stop_interval", "2"), "--early_stop_interval needs rows to evaluate"),
        ("start", "", ("--eval_on_start", "true"), "--eval_on_start needs rows to evaluate"),
    ],
)
def test_what_cannot_take_part_is_refused_before_the_run(tmp_path, capsys, name, source, flags, message):
    data = write_rows(tmp_path / "rows.jsonl")
    plugins = plugin(tmp_path, name, source)
    flags = [flag.format(file=plugins[1]) for flag in flags]
    command = sft_command(tmp_path / "no-model", data, tmp_path / "out", *plugins, *flags)
    assert run_command(command) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_that_does_not_improve_is_stopped_also_after_a_resume(tiny_llama_dir, tmp_path, capsys):
    """Without a learning rate every evaluation gives the first one's loss."""
    data = write_rows(tmp_path / "rows.jsonl")
    flags = (
        "--split_dataset_ratio", "0.2", "--eval_steps", "1", "--save_steps", "2", "--learning_rate", "0",
        "--early_stop_interval", "3", "--eval_on_start", "true",
    )  # fmt: skip
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 0
    run = only_run(tmp_path / "out")
    log = read_log(run)
    steps = [row["global_step/max_steps"] for row in log if "eval_loss" in row]
    assert steps == ["0/15", "1/15", "2/15", "3/15"] and "eval_loss" in log[0]
    assert saved(run) == ["checkpoint-2", "checkpoint-3"]
    told = "stopped after step 3: eval_loss has not improved on"
    assert told in capsys.readouterr().err
    assert run_command(["sft", "--resume_from_checkpoint", str(run / "checkpoint-2")]) == 0
    again = [row["global_step/max_steps"] for row in read_log(run) if "eval_loss" in row]
    assert again == steps and told in capsys.readouterr().err


def test_profiled_steps_leave_a_trace(tiny_llama_dir, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl")
    flags = ("--max_steps", "4", "--profile_steps", "2:3", "--save_strategy", "no")
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 0
    trace = only_run(tmp_path / "out") / "profile" / "steps-2-3.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2
    assert "profile of steps 2 to 3:" in capsys.readouterr().err
    late = ("--max_steps", "1", "--profile_steps", "2:3", "--save_strategy", "no")
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "late", *late)) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--profile_steps 2:3: this run does steps 1 to 1, so nothing is profiled" in told
