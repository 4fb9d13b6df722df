"""`megatron rlhf` and `megatron pt` draw the curves of `swift rlhf` and `swift pt`, in parts of the model."""

import json
from pathlib import Path

import pytest
from test_rlhf import write, write_liked, write_pairs

from swift.models.heads import count_labels

TP2 = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")
PP2 = ("--pipeline_model_parallel_size", "2")
NAMES = ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/chosen", "kl", "eval_loss")
LORA = ("--train_type", "lora", "--lora_rank", "4", "--lora_dropout", "0", "--target_modules", "all-linear")
FULL = ("--train_type", "full")


def read_curve(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    curve = [{name: row[name] for name in NAMES if name in row} for row in rows]
    return [row for row in curve if row]


def compare(workers, megatron_workers, words: list[str], folder: Path, layout: tuple[str, ...]) -> None:
    common = [
        "--add_version", "false", "--learning_rate", "5e-3", "--adam_epsilon", "1e-4",
        "--weight_decay", "0.1", "--adam_beta2", "0.95", "--logging_steps", "1", "--max_steps", "4",
        "--report_to", "none", "--per_device_train_batch_size", "4", "--save_steps", "4", "--output_dir",
    ]  # fmt: skip
    plain, cut = folder / "plain", folder / "cut"
    result = workers.run([*words, *common, str(plain), "--gradient_accumulation_steps", "2"])
    assert result.code == 0, result.stderr[-3000:]
    size = ("--global_batch_size", "8", "--recompute_granularity", "none")
    result = megatron_workers.run(["megatron", *words, *common, str(cut), *size, *layout], 2)
    assert result.code == 0, result.stderr[-3000:]
    ours, theirs = read_curve(cut), read_curve(plain)
    assert len(ours) == len(theirs) >= 4 and all("loss" in row or "eval_loss" in row for row in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tuner", "layout"),
    [("dpo", FULL, TP2), ("dpo", LORA, PP2), ("kto", FULL, PP2), ("kto", LORA, TP2)],
    ids=["dpo-full-tp2", "dpo-lora-pp2", "kto-full-pp2", "kto-lora-tp2"],
)
def test_preferences(workers, megatron_workers, tiny_qwen3_dir, tmp_path, kind, tuner, layout):
    data = {"dpo": write_pairs, "kto": write_liked}[kind](tmp_path / "rows.jsonl", 20)
    words = ["rlhf", "--rlhf_type", kind, "--model", str(tiny_qwen3_dir), "--dataset", str(data), *tuner]
    compare(workers, megatron_workers, [*words, "--split_dataset_ratio", "0.2"], tmp_path, layout)


@pytest.mark.slow
def test_streamed_text(workers, megatron_workers, tiny_qwen3_dir, tmp_path):
    rows = [
        {"messages": [{"role": "assistant", "content": f"Text {i}" + " and more" * (i % 9)}]}
        for i in range(24)
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    words = ["pt", "--model", str(tiny_qwen3_dir), "--dataset", str(data), *FULL, "--streaming", "true"]
    compare(workers, megatron_workers, words, tmp_path, PP2)


@pytest.mark.slow
def test_reward_model(workers, megatron_workers, tiny_qwen3_dir, tmp_path):
    """A new head starts as that of swift does; what is saved gives the scores that swift's adapters give."""
    data = write_pairs(tmp_path / "rows.jsonl", 20)
    words = ["rlhf", "--rlhf_type", "rm", "--model", str(tiny_qwen3_dir), "--dataset", str(data), *LORA]
    compare(workers, megatron_workers, [*words, "--split_dataset_ratio", "0.2"], tmp_path, PP2)
    texts = [{"query": f"What about {i}?", "response": "It is so."} for i in range(3)]
    asked, found = write(tmp_path / "texts.jsonl", texts), []
    for run in ("plain", "cut"):
        scores = tmp_path / f"{run}.jsonl"
        ask = ["infer", "--adapters", str(tmp_path / run / "last"), "--val_dataset", str(asked)]
        result = workers.run([*ask, "--result_path", str(scores)])
        assert result.code == 0, result.stderr[-3000:]
        found.append([json.loads(line)["score"] for line in scores.read_text().splitlines()])
    assert len(set(found[0])) == 3 and found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_heads_on_weights_of_megatron(megatron_workers, tiny_qwen3_dir, tmp_path):
    """Converted weights have no head and get the one that a model would get; those of a run have one."""
    rows = [
        {"query": f"{'apple' if i % 2 else 'stone'} {i}", "response": ".", "label": i % 2} for i in range(16)
    ]
    data, mcore = write(tmp_path / "rows.jsonl", rows), tmp_path / "mcore"
    to_mcore = ["export", "--model", str(tiny_qwen3_dir), "--to_mcore", "true", "--output_dir", str(mcore)]
    assert megatron_workers.run(to_mcore).code == 0
    task = ["--task_type", "seq_cls", "--num_labels", "2"]
    once = ["megatron", "sft", "--dataset", str(data), "--add_version", "false", "--train_iters", "1"]
    kept, losses = tmp_path / "0/checkpoint-1", []
    starts = (
        ("--load", mcore),
        ("--model", tiny_qwen3_dir),
        ("--load", kept / "iter_0000001"),
        ("--model", kept),
    )
    for number, (flag, path) in enumerate(starts):
        words = [*task, flag, str(path), "--lr", "1e-3", "--save", str(tmp_path / str(number))]
        result = megatron_workers.run([*once, *words])
        assert result.code == 0, result.stderr[-3000:]
        losses.append(read_curve(tmp_path / str(number))[0]["loss"])
    assert losses[0] == losses[1] > losses[2] == losses[3]
    assert count_labels(kept) == 2
    result = megatron_workers.run([*once, "--load", str(kept / "iter_0000001")])
    assert result.code == 2 and "it holds score.weight" in result.stderr
