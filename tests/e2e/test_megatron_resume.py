"""Runs of `megatron` go on as if nothing had happened: killed, and cut in another way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_kills import HOOKS, KILLED, write_rows

STEPS = 8
TP2 = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")


def read_log(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    names = ("global_step/max_steps", "loss", "grad_norm", "eval_loss")
    return [tuple(row.get(name) for name in names) for row in rows if "loss" in row or "eval_loss" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last/model.safetensors")


def assert_near(run: Path, reference: Path, since: int) -> None:
    theirs = [row for row in read_log(reference) if int(row[0].split("/")[0]) > since]
    ours = read_log(run)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0] == other[0]
        for value, expected in zip(mine[1:], other[1:], strict=True):
            assert value == expected or value == pytest.approx(expected, rel=1e-5), (mine, other)
    expected = weights(reference)
    for name, tensor in weights(run).items():
        assert (tensor - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.slow
def test_a_killed_run_goes_on_in_any_layout(megatron_workers, make_tiny_model_dir, tmp_path):
    """To the bit in its own; TP2, PP2 and one process after each other draw the same curve."""
    model = make_tiny_model_dir(tmp_path, "qwen3", tie_word_embeddings=False)
    data = write_rows(tmp_path / "rows.jsonl")

    def start(output: Path, *flags: str, **options):
        words = [
            "megatron", "sft", "--model", str(model), "--dataset", str(data), "--save", str(output),
            "--add_version", "false", "--train_iters", str(STEPS), "--lr", "5e-3", "--adam_eps", "1e-4",
            "--micro_batch_size", "2", "--global_batch_size", "4", "--save_interval", "3",
            "--log_interval", "1", "--eval_interval", "4", "--eval_iters", "1",
            "--split_dataset_ratio", "0.2", *TP2, *flags,
        ]  # fmt: skip
        return megatron_workers.run(words, 2, **options)

    def go_on(processes: int, *flags: str):
        result = megatron_workers.run(["megatron", "sft", *flags], processes)
        assert result.code == 0, result.stderr[-3000:]
        return result.stderr

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = start(whole)
    assert result.code == 0, result.stderr[-3000:]
    assert [row[0] for row in read_log(whole) if row[3]] == ["4/8", "8/8"]
    stop = {"step": 7, "name": "SIGKILL", "victim": 1}
    result = start(broken, hook=f"{HOOKS}:signal_at", hook_arguments=stop)
    assert result.codes[1] == KILLED, result.stderr[-3000:]
    kept = shutil.copytree(broken, tmp_path / "kept", symlinks=True)
    go_on(2, "--resume_from_checkpoint", str(broken))
    assert read_log(broken) == read_log(whole)
    ours, theirs = weights(broken), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for run in (whole, broken):
        assert (run / "latest_checkpointed_iteration.txt").read_text() == "8\n"
        assert {p.name: p.readlink().as_posix() for p in run.glob("iter_*")} == {
            f"iter_{step:07d}": f"checkpoint-{step}/iter_{step:07d}" for step in (3, 6, 8)
        }
        assert not list(run.glob(".*"))
    shutil.rmtree(kept / "checkpoint-6", ignore_errors=True)
    first, second = tmp_path / "first", tmp_path / "second"
    go_on(
        2, "--load", str(kept), "--finetune", "false", "--save", str(first),
        "--pipeline_model_parallel_size", "2",
    )  # fmt: skip
    assert_near(first, whole, 3)
    go_on(1, "--load", str(first / "checkpoint-6"), "--finetune", "false", "--save", str(second))
    assert_near(second, whole, 6)
    third = tmp_path / "third"
    go_on(
        2, "--load", str(kept), "--finetune", "false", "--save", str(third),
        "--tensor_model_parallel_size", "1",
    )  # fmt: skip
    assert_near(third, whole, 3)
    args = json.loads((third / "args.json").read_text())
    assert (args["tensor_model_parallel_size"], args["sequence_parallel"]) == (1, False)


@pytest.mark.slow
def test_what_a_run_goes_on_without(megatron_workers, make_tiny_model_dir, tmp_path):
    """Random states are what dropout draws from, the optimizer's state is what a step is made of."""
    model = make_tiny_model_dir(tmp_path, "qwen3", attention_dropout=0.5)
    data = write_rows(tmp_path / "rows.jsonl")

    def start(output: str, *flags: str) -> dict[str, tuple]:
        words = ["megatron", "sft", "--save", str(tmp_path / output), "--add_version", "false", *flags]
        result = megatron_workers.run(words)
        assert result.code == 0, result.stderr[-3000:]
        return {row[0].split("/")[0]: row[1:3] for row in read_log(tmp_path / output)}

    whole = start(
        "whole", "--model", str(model), "--dataset", str(data), "--train_iters", "4", "--lr", "5e-3",
        "--micro_batch_size", "4", "--global_batch_size", "4", "--save_interval", "2", "--log_interval", "1",
    )  # fmt: skip
    go_on = ("--finetune", "false", "--load", str(tmp_path / "whole/checkpoint-2"))
    assert start("same", *go_on) == {step: whole[step] for step in ("3", "4")}
    found = start("random", *go_on, "--no_load_rng", "true")
    assert abs(found["3"][0] - whole["3"][0]) > 1e-3  # the same weights and rows, other draws
    found = start("fresh", *go_on, "--no_load_optim", "true")
    assert found["3"] == whole["3"] and abs(found["4"][0] - whole["4"][0]) > 1e-3
