"""One loss, any number of processes: DDP and FSDP2 against one process, through the command line, on gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from workers import Workers

ROWS = 29  # steps of 8 rows: the last step of an epoch has 5, so ranks and micro-batches are uneven


def write_rows(path: Path) -> Path:
    questions = ("Who are you?", "What is your name?", "Who made you?", "What is the capital of France?")
    rows = [
        {
            "query": questions[i % 4] + " more" * (i % 7),
            "response": f"Answer {i} of swift-robot." * (1 + i % 3),
        }
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(workers: Workers, data: Path, model: Path, output: Path, processes: int, *flags: str) -> Path:
    command = [
        "sft", "--model", str(model), "--dataset", str(data),
        "--output_dir", str(output), "--add_version", "false",
        "--learning_rate", "2e-3", "--num_train_epochs", "3", "--logging_steps", "1", "--save_steps", "6",
        "--lora_dropout", "0", "--split_dataset_ratio", "0", *flags,
    ]  # fmt: skip
    result = workers.run(command, processes)
    assert result.code == 0, result.stderr[-3000:]
    return output


def read_curve(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def batch(size: int, accumulation: int) -> tuple[str, ...]:
    return ("--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(accumulation))


def assert_same_curve(run: Path, reference: Path) -> None:
    """Losses within 1e-6, and no drift: the mean of the signed differences is far below that."""
    ours, theirs = read_curve(run), read_curve(reference)
    assert len(ours) == len(theirs) == 12
    residuals = [(a[0] - b[0]) / b[0] for a, b in zip(ours, theirs, strict=True)]
    assert max(map(abs, residuals)) < 1e-6
    assert abs(sum(residuals)) / len(residuals) < 5e-7
    assert [a[1] for a in ours] == pytest.approx([b[1] for b in theirs], rel=2e-5)


def assert_same_weights(run: Path, reference: Path, name: str) -> None:
    ours, theirs = load_file(run / "last" / name), load_file(reference / "last" / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


@pytest.mark.slow
def test_full_training_on_two_processes_is_that_on_one(workers, tiny_qwen3_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    single = train(
        workers, data, tiny_qwen3_dir, tmp_path / "single", 1, *batch(8, 1), "--train_type", "full"
    )
    small_buckets = ("--train_type", "full", "--ddp_bucket_cap_mb", "1")
    ddp = train(workers, data, tiny_qwen3_dir, tmp_path / "ddp", 2, *batch(2, 2), *small_buckets)
    for_slices = ("--train_type", "full", "--fsdp", "fsdp2")
    fsdp = train(workers, data, tiny_qwen3_dir, tmp_path / "fsdp", 2, *batch(4, 1), *for_slices)
    for run in (ddp, fsdp):
        assert_same_curve(run, single)
        assert_same_weights(run, single, "model.safetensors")
    # A run goes on in another layout: from slices on two processes to one.
    result = workers.run(["sft", "--resume_from_checkpoint", str(fsdp / "checkpoint-6")])
    assert result.code == 0, result.stderr[-3000:]
    assert_same_curve(fsdp, single)


@pytest.mark.slow
def test_adapters_on_two_processes_are_those_on_one(workers, tiny_llama_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    kinds = ("--lorap_lr_ratio", "8", "--modules_to_save", "all-embedding", "--use_dora", "true")
    single = train(workers, data, tiny_llama_dir, tmp_path / "single", 1, *batch(2, 4), *kinds)
    fsdp = train(
        workers, data, tiny_llama_dir, tmp_path / "fsdp", 2, *batch(2, 2), "--fsdp", "full_shard", *kinds
    )
    assert_same_curve(fsdp, single)
    assert_same_weights(fsdp, single, "adapter_model.safetensors")


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_all_processes(tiny_llama_dir, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "x", "resp\n')
    command = [
        "sft",
        "--model",
        str(tiny_llama_dir),
        "--dataset",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2"}  # the way through torchrun
    result = subprocess.run(
        [sys.executable, "-m", "swift", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("not valid JSON") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_number_of_processes_has_to_be_a_number(tiny_llama_dir, tmp_path):
    environment = {**os.environ, "NPROC_PER_NODE": "two"}
    command = [sys.executable, "-m", "swift", "sft", "--model", str(tiny_llama_dir), "--dataset", "x.jsonl"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "NPROC_PER_NODE=two is not a number of processes" in result.stderr
