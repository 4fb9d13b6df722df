"""`swift sft` as a user runs it, on a tiny model: what it leaves, what it learns, how it is resumed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swift.cli.main import run as run_command

QUESTIONS = ("Who are you?", "What is your name?", "Who made you?", "What is the capital of France?")


def write_rows(path: Path, count: int = 24) -> Path:
    rows = [
        {"query": f"{QUESTIONS[i % 4]} ({i})", "response": f"Answer {i % 4} of swift-robot."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def sft_command(model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    return [
        "sft", "--model", str(model), "--dataset", str(data), "--output_dir", str(output),
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--learning_rate", "5e-3",
        "--logging_steps", "1", "--report_to", "none", *flags,
    ]  # fmt: skip


def only_run(output: Path) -> Path:
    (run,) = output.glob("v*-*")
    return run


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[str, float, float]]:
    return [(r["global_step/max_steps"], r["loss"], r["grad_norm"]) for r in read_log(run) if "loss" in r]


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_a_run_learns_and_leaves_what_users_expect(tiny_llama_dir, tmp_path, train_type):
    data = write_rows(tmp_path / "rows.jsonl")
    flags = (
        "--train_type",
        train_type,
        "--num_train_epochs",
        "4",
        "--split_dataset_ratio",
        "0.2",
        "--save_steps",
        "5",
        "--report_to",
        "tensorboard",
    )
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 0
    run = only_run(tmp_path / "out")
    log = read_log(run)
    train = [r for r in log if "loss" in r]
    assert train[-1]["loss"] < train[0]["loss"] - 0.5 and train[-1]["token_acc"] > 0.8
    assert set(train[0]) >= {
        "loss", "token_acc", "grad_norm", "learning_rate", "epoch", "global_step/max_steps", "percentage",
        "elapsed_time", "remaining_time", "memory(GiB)", "train_speed(iter/s)", "tokens/s",
    }  # fmt: skip
    evaluations = [r["eval_loss"] for r in log if "eval_loss" in r]
    assert evaluations[-1] < evaluations[0]
    assert log[-1]["last_model_checkpoint"] == str(run / "checkpoint-20")
    assert json.loads((run / "args.json").read_text())["train_type"] == train_type
    assert {p.name for p in run.iterdir()} >= {
        "args.json",
        "logging.jsonl",
        "runs",
        "images",
        "val_dataset.jsonl",
    }
    assert (run / "images" / "train_loss.png").stat().st_size > 1000
    assert list((run / "runs").glob("events.out.tfevents*"))
    weights = "adapter_model.safetensors" if train_type == "lora" else "model.safetensors"
    assert load_file(run / "last" / weights)
    held_out = (run / "val_dataset.jsonl").read_text().splitlines()
    assert len(held_out) == 5 and "query" in json.loads(held_out[0])


def test_accumulation_does_not_change_the_curve(tiny_llama_dir, tmp_path):
    """1x8 and 4x2 through the command line; without dropout, since its noise depends on shapes."""
    data = write_rows(tmp_path / "rows.jsonl")
    curves = []
    for name, batch, accumulation in (("a", "8", "1"), ("b", "2", "4")):
        command = [
            *sft_command(tiny_llama_dir, data, tmp_path / name),
            "--lora_dropout", "0", "--num_train_epochs", "2",
            "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
            "--save_strategy", "no",
        ]  # fmt: skip
        assert run_command(command) == 0
        curves.append([loss for _, loss, _ in losses(only_run(tmp_path / name))])
    assert curves[0] == pytest.approx(curves[1], rel=2e-5)


def test_when_things_happen(tiny_llama_dir, tmp_path, capsys):
    """22 rows, 18 of them trained on in 4 steps an epoch: a fifth would not be full."""
    data = write_rows(tmp_path / "rows.jsonl", 22)
    flags = (
        "--split_dataset_ratio", "0.18", "--num_train_epochs", "3", "--logging_strategy", "epoch",
        "--eval_steps", "2", "--eval_delay", "7", "--dataloader_drop_last", "true", "--save_strategy", "no",
        "--full_determinism", "true", "--disable_tqdm", "true",
    )  # fmt: skip
    try:
        assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    log = read_log(only_run(tmp_path / "out"))[:-1]
    steps = {name: [r["global_step/max_steps"] for r in log if name in r] for name in ("loss", "eval_loss")}
    assert steps == {"loss": ["1/12", "4/12", "8/12", "12/12"], "eval_loss": ["8/12", "10/12", "12/12"]}
    capsys.readouterr()
    flags = ("--dataloader_drop_last", "true", "--gradient_accumulation_steps", "8")
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "no", *flags)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--dataloader_drop_last true leaves nothing: 22 rows or packs, and a step takes 32" in said


def test_resuming_refuses_another_run(tiny_llama_dir, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl")
    command = sft_command(tiny_llama_dir, data, tmp_path / "out", "--max_steps", "4", "--save_steps", "2")
    assert run_command(command) == 0
    run = only_run(tmp_path / "out")
    resume = ["sft", "--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert run_command([*resume, "--lora_rank", "4"]) == 2
    assert "--lora_rank 4 differs from the checkpoint's 8" in capsys.readouterr().err
    write_rows(data, 23)
    assert run_command(resume) == 2
    assert "the training data differs from the checkpoint's: rows was 24, now 23" in capsys.readouterr().err
    optimizer = run / "checkpoint-4" / "optimizer-00001-of-00001.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    assert run_command(["sft", "--resume_from_checkpoint", str(run / "checkpoint-4")]) == 2
    errors = capsys.readouterr().err
    assert f"{optimizer.name} has 1000 bytes" in errors and f"resume from {run / 'checkpoint-2'}" in errors
