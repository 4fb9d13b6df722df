"""Runs that are killed, stopped or starved at any point go on as if nothing had happened.

Kill points are drawn at random; the seed is part of a failure's message and SEED repeats it.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from swift.models.directory import list_checkpoints

HOOKS = Path(__file__).with_name("kill_points.py")
SEED = int(os.environ.get("SEED") or random.randrange(10**6))
STEPS = 14
KILLED = -9


def write_rows(path: Path) -> Path:
    rows = [
        {"query": f"Who are you? ({i})" + " more" * (i % 5), "response": f"Answer {i}."} for i in range(28)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    return [
        "sft", "--model", str(model), "--dataset", str(data), "--output_dir", str(output),
        "--add_version", "false", "--max_steps", str(STEPS), "--learning_rate", "5e-3",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--save_steps", "3", "--eval_steps", "4", "--logging_steps", "2", "--save_total_limit", "2",
        "--split_dataset_ratio", "0.1", "--report_to", "none", *flags,
    ]  # fmt: skip


def read_log(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    names = ("global_step/max_steps", "loss", "grad_norm", "eval_loss", "train_loss")
    return [tuple(row.get(name) for name in names) for row in rows]


def weights(run: Path) -> dict:
    (path,) = (run / "last").glob("*model.safetensors")
    return load_file(path)


def assert_same(run: Path, reference: Path, message: str) -> None:
    assert read_log(run) == read_log(reference), message
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours), message
    assert not list(run.glob(".checkpoint-*")), message


class Killer:
    """A command line that is killed, and goes on until it is not."""

    def __init__(self, workers, arguments: list[str], output: Path) -> None:
        self.workers, self.arguments, self.output = workers, arguments, output

    def run(self, event: int, processes: int = 1, victim: int = 0, flags: tuple[str, ...] = (), **hook):
        """Starts, or goes on where there is something to go on from; killed at that event."""
        resume = ["sft", "--resume_from_checkpoint", str(self.output), *flags]
        arguments = resume if list_checkpoints(self.output) else [*self.arguments, *flags]
        counted = {"counted": str(self.output.with_suffix(".count"))}
        return self.workers.run(
            arguments,
            processes,
            hook=f"{HOOKS}:kill_at",
            hook_arguments={"event": event, "victim": victim, **counted, **hook},
        )

    def events(self) -> int:
        return int(self.output.with_suffix(".count").read_text())


def kill_and_compare(workers, model: Path, folder: Path, *, wanted: int, length: int, flags: tuple) -> None:
    """Chains of kills in one run, each equal to the unbroken run to the bit, until there are enough kills.

    A run that goes on has fewer events left, and may be over before the next of its kills.
    """
    data, generator = write_rows(folder / "rows.jsonl"), random.Random(SEED)
    whole = Killer(workers, command(model, data, folder / "whole", *flags), folder / "whole")
    result = whole.run(0)
    assert result.code == 0, result.stderr[-3000:]
    assert len(read_log(folder / "whole")) == 1 + STEPS // 2 + 4 + 1
    kills = chain = 0
    while kills < wanted:
        chain += 1
        output = folder / f"chain-{chain}"
        broken = Killer(workers, command(model, data, output, *flags), output)
        points = [generator.randint(1, whole.events()) for _ in range(length)]
        message = f"SEED={SEED}, chain {chain}, killed at {points} of {whole.events()}"
        for point in [*points, 0]:
            result = broken.run(point)
            assert result.code in (0, KILLED), message + result.stderr[-3000:]
            if result.code == 0:
                break
            kills += 1
        assert result.code == 0, message
        assert_same(output, folder / "whole", message)
        shutil.rmtree(output)


def test_runs_killed_anywhere_go_on_to_the_bit(workers, tiny_llama_dir, tmp_path):
    kill_and_compare(workers, tiny_llama_dir, tmp_path, wanted=1, length=4, flags=())


@pytest.mark.slow_suite
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_thirty_kills(workers, tiny_llama_dir, tmp_path, train_type):
    """15 for each way of training."""
    flags = ("--train_type", train_type)
    kill_and_compare(workers, tiny_llama_dir, tmp_path, wanted=15, length=3, flags=flags)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_processes(workers, tiny_qwen3_dir, tmp_path):
    """Two processes with copies; then two with slices, one of them killed while saving; then one."""
    data, full = write_rows(tmp_path / "rows.jsonl"), ("--train_type", "full")
    whole = Killer(workers, command(tiny_qwen3_dir, data, tmp_path / "whole", *full), tmp_path / "whole")
    assert whole.run(0).code == 0
    output = tmp_path / "broken"
    halves = ("--per_device_train_batch_size", "1")
    broken = Killer(workers, command(tiny_qwen3_dir, data, output, *full), output)
    stops = random.Random(SEED)
    message = f"SEED={SEED}"
    for victim, flags in ((0, ()), (1, ("--fsdp", "fsdp2"))):
        result = broken.run(stops.randint(1, 40), 2, victim, (*halves, *flags), saved=str(output))
        assert result.codes[victim] == KILLED, message + result.stderr[-3000:]
        assert list_checkpoints(output), message
    result = broken.run(0, 1, 0, ("--per_device_train_batch_size", "2"))
    assert result.code == 0, message + result.stderr[-3000:]
    ours, theirs = read_log(output), read_log(tmp_path / "whole")
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a[1:], b[1:], strict=True):
            assert x == y or x == pytest.approx(y, rel=2e-5 if y is a[2] else 1e-6), message


@pytest.mark.slow
def test_a_termination_is_saved_and_goes_on(workers, tiny_llama_dir, tmp_path):
    """SIGTERM to one of two: both stop after the same step, with a checkpoint; to the bit afterwards."""
    data, flags = write_rows(tmp_path / "rows.jsonl"), ("--per_device_train_batch_size", "1")
    assert workers.run(command(tiny_llama_dir, data, tmp_path / "whole", *flags), 2).code == 0
    run = tmp_path / "run"
    result = workers.run(
        command(tiny_llama_dir, data, run, *flags),
        2,
        hook=f"{HOOKS}:signal_at",
        hook_arguments={"step": 7, "name": "SIGTERM", "victim": 1},
    )
    assert result.codes == [143, 143], result.stderr[-3000:]
    assert f"terminated at step 8; go on with --resume_from_checkpoint {run}" in result.stderr
    assert [step for step, _ in list_checkpoints(run)][-1] == 8
    result = workers.run(["sft", "--resume_from_checkpoint", str(run)], 2)
    assert result.code == 0, result.stderr[-3000:]
    assert_same(run, tmp_path / "whole", "after SIGTERM")


def test_ctrl_c_finishes_the_checkpoint_that_is_being_written(workers, tiny_llama_dir, tmp_path):
    data, run = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    result = workers.run(
        command(tiny_llama_dir, data, run),
        hook=f"{HOOKS}:interrupt_while_saving",
        hook_arguments={"step": 6},
    )
    assert result.code == 130, result.stderr[-3000:]
    assert "finishing checkpoint-6; Ctrl-C again quits at once" in result.stderr
    assert f"interrupted at step 6; go on with --resume_from_checkpoint {run}" in result.stderr
    assert [step for step, _ in list_checkpoints(run)] == [3, 6] and not list(run.glob(".checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line(workers, tiny_llama_dir, tmp_path, processes):
    """The last rank may not write files as large as its optimizer states."""
    data, run = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    flags = ("--train_type", "full", "--per_device_train_batch_size", str(2 // processes))
    result = workers.run(
        command(tiny_llama_dir, data, run, *flags),
        processes,
        hook=f"{HOOKS}:limit_files",
        hook_arguments={"step": 4, "limit_bytes": 100_000, "victim": processes - 1},
    )
    assert result.code == 2, result.stderr[-3000:]
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("error:")][:1]
    assert f"checkpoint-6 cannot be written to {run}: File too large (" in line
    assert line.endswith(
        ".checkpoint-6.tmp was removed; the last whole one is checkpoint-3; training was stopped"
    )
    assert f"hint: make room, then go on with --resume_from_checkpoint {run}" in result.stderr
    assert [p.name for p in run.glob("*checkpoint*")] == ["checkpoint-3"]
    assert workers.run(["sft", "--resume_from_checkpoint", str(run)], processes).code == 0
