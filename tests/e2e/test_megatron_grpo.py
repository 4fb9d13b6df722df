"""`megatron rlhf --rlhf_type grpo`, `ppo` and `gkd` learn what `swift rlhf` learns, in parts of the model."""

from pathlib import Path

import pytest
import test_gkd
import test_grpo
import torch
from safetensors.torch import load_file
from test_sft import read_log

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TP2 = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")
PP2 = ("--pipeline_model_parallel_size", "2")
EP2 = ("--expert_model_parallel_size", "2")
LORA = ("--train_type", "lora", "--lora_rank", "4", "--lora_dropout", "0", "--target_modules", "all-linear")
WITNESS = """

def witness(completions, **kwargs):
    import os
    from pathlib import Path

    Path(__file__).with_name(f"asked-{os.environ.get('WORLD_SIZE')}-{os.environ.get('RANK')}").touch()
    return [0.1] * len(completions)


orms["witness"] = witness
"""
SAME = (
    "--adam_epsilon", "1e-4", "--weight_decay", "0.1", "--adam_beta2", "0.95", "--add_version", "false",
    "--max_steps", "4", "--learning_rate", "5e-3",
)  # fmt: skip
NAMES = (
    "loss", "reward", "reward_std", "grad_norm", "kl", "entropy/mean", "completions/mean_length",
    "clip_ratio/region_mean", "divergence", "nll_loss", "eval_loss", "value/loss",
)  # fmt: skip


def curve(run: Path) -> list[dict[str, float]]:
    rows = [{name: row[name] for name in NAMES if name in row} for row in read_log(run)]
    return [row for row in rows if row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (
        *run.glob("checkpoint-4/adapter_model.safetensors"),
        *run.glob("checkpoint-4/model.safetensors"),
    )
    return load_file(file)


def compare(plain: Path, cut: Path) -> None:
    ours, theirs = curve(cut), curve(plain)
    assert len(ours) == len(theirs) >= 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6), (ours, theirs)
    found, expected = weights(cut), weights(plain)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5, name


def megatron(workers, arguments: list[str], *layout: str) -> None:
    result = workers.run(["megatron", *arguments, *layout], 2)
    assert result.code == 0, result.stderr[-3000:]
    assert "answers: by a copy of the model that every process has for them" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "flags"),
    [
        ("qwen3", TP2, ("--top_entropy_quantile", "0.5", "--log_entropy", "true")),
        ("llama", PP2, (*LORA, "--kl_in_reward", "true", "--reward_funcs", "spaces", "witness")),
        ("qwen3_moe", EP2, (*LORA, "--beta", "0", "--loss_type", "dapo")),
    ],
    ids=["full-tp2", "lora-pp2", "experts-ep2"],
)  # fmt: skip
def test_rewards(workers, megatron_workers, make_tiny_model_dir, tmp_path, family, layout, flags):
    model = make_tiny_model_dir(tmp_path, family, **(EXPERTS if layout is EP2 else {}))
    _, plugin = test_grpo.write_prompts(tmp_path)
    plugin.write_text(plugin.read_text() + WITNESS)
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    # With one data rank, each rollout is learnt from in two steps, twice.
    more = () if layout is EP2 else ("--steps_per_generation", "2", "--num_iterations", "2")
    result = workers.run(test_grpo.command(model, tmp_path, plain, *SAME, *flags, *more))
    assert result.code == 0, result.stderr[-3000:]
    size = ("--per_device_train_batch_size", "4", "--global_batch_size", "16", "--save_steps", "1")
    arguments = test_grpo.command(model, tmp_path, cut, *SAME, *flags, *more, *size)
    megatron(megatron_workers, arguments, *layout)
    compare(plain, cut)
    if layout is PP2:  # the last stage alone was asked; it goes on with the answers that it had
        assert [path.name for path in tmp_path.glob("asked-2-*")] == ["asked-2-1"]
        again = tmp_path / "again"
        resumed = ["rlhf", "--resume_from_checkpoint", str(cut / "checkpoint-1"), "--add_version", "false"]
        megatron(megatron_workers, [*resumed, "--output_dir", str(again)])
        assert curve(again) == curve(cut)[1:]
        ours, theirs = weights(again), weights(cut)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        pytest.param(TP2, ("--lmbda", "0.5", "--sft_alpha", "0.3"), marks=pytest.mark.slow_suite),
        (PP2, (*LORA, "--lmbda", "0.5", "--sft_alpha", "0.3", "--gkd_logits_topk", "20")),
    ],
    ids=["full-tp2", "lora-pp2"],
)  # fmt: skip
def test_a_teacher(workers, megatron_workers, tiny_llama_dir, make_tiny_model_dir, tmp_path, layout, flags):
    """A teacher of another width and depth; the student's own answers and those of the data."""
    sizes = {"hidden_size": 96, "num_hidden_layers": 4}
    teacher = make_tiny_model_dir(tmp_path / "teacher", "qwen3", seed=3, **sizes)
    data = test_gkd.write_chats(tmp_path / "chats.jsonl")
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    common = (*SAME, "--eval_steps", "4", *flags)
    result = workers.run(test_gkd.command(tiny_llama_dir, teacher, data, plain, *common))
    assert result.code == 0, result.stderr[-3000:]
    arguments = test_gkd.command(tiny_llama_dir, teacher, data, cut, *common)
    at = arguments.index("--gradient_accumulation_steps")
    arguments[at : at + 2] = ["--global_batch_size", "8"]
    megatron(megatron_workers, [*arguments, "--per_device_train_batch_size", "4"], *layout)
    compare(plain, cut)


@pytest.mark.slow
def test_a_value_model(workers, megatron_workers, tiny_llama_dir, tmp_path):
    """PPO's second model is cut as the first one is; a run goes on with both."""
    test_grpo.write_prompts(tmp_path)
    plain, cut, again = tmp_path / "plain", tmp_path / "cut", tmp_path / "again"

    def command(output: Path, *flags: str) -> list[str]:
        words = test_grpo.command(tiny_llama_dir, tmp_path, output, *SAME, "--kl_coef", "0.01", *flags)
        at = words.index("--num_generations")
        return [*words[:at], *words[at + 2 :], "--rlhf_type", "ppo", "--num_ppo_epochs", "2"]

    result = workers.run(command(plain))
    assert result.code == 0, result.stderr[-3000:]
    size = ("--per_device_train_batch_size", "4", "--global_batch_size", "16", "--save_steps", "3")
    megatron(megatron_workers, command(cut, *size), *TP2)
    compare(plain, cut)
    found, expected = (load_file(run / "checkpoint-4/value_model/model.safetensors") for run in (cut, plain))
    assert found.keys() == expected.keys()
    assert all((found[name] - tensor).abs().max() <= 1e-5 for name, tensor in expected.items())
    resumed = ["rlhf", "--resume_from_checkpoint", str(cut / "checkpoint-3"), "--add_version", "false"]
    megatron(megatron_workers, [*resumed, "--output_dir", str(again)])
    assert curve(again) == curve(cut)[3:]
    for name in ("model.safetensors", "value_model/model.safetensors"):
        ours, theirs = (load_file(run / "checkpoint-4" / name) for run in (again, cut))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), name


def test_mistakes_are_one_line(megatron_workers, tiny_llama_dir, make_tiny_model_dir, tmp_path):
    """Before weights are read: a layout that a teacher does not have, numbers that do not come out even."""
    test_grpo.write_prompts(tmp_path)
    data = test_gkd.write_chats(tmp_path / "chats.jsonl")
    larger = make_tiny_model_dir(tmp_path / "larger", "llama", vocab_size=640)
    odd = make_tiny_model_dir(tmp_path / "odd", "llama", num_hidden_layers=3)
    out = tmp_path / "out"
    rewards = test_grpo.command(tiny_llama_dir, tmp_path, out, "--max_steps", "2")
    taught = [test_gkd.command(tiny_llama_dir, teacher, data, out) for teacher in (larger, odd, None)]
    for arguments in taught:
        at = arguments.index("--gradient_accumulation_steps")
        arguments[at : at + 2] = ["--global_batch_size", "8"]
    for arguments, flags, processes, message in (
        (
            rewards, ("--num_generations", "5"), 1,
            "a rollout has 16 answers (--global_batch_size 16 x 1 steps), which is not a multiple of",
        ),
        (
            rewards, ("--generation_batch_size", "24"), 1,
            "--generation_batch_size 24 is not a multiple of --global_batch_size 16",
        ),
        (
            rewards, (*TP2, "--use_gym_env", "true"), 1,
            "--tensor_model_parallel_size does not go with conversations of several turns yet",
        ),
        (
            taught[2], (*PP2, "--gkd_logits_topk", "5", "--teacher_model_server", "http://h:1"), 1,
            "--pipeline_model_parallel_size does not go with --teacher_model_server yet",
        ),
        (taught[0], TP2, 2, "/own-llama has 640 tokens, the model "),
        (taught[1], PP2, 2, "/own-llama: --pipeline_model_parallel_size 2 does not divide"),
    ):  # fmt: skip
        result = megatron_workers.run(["megatron", *arguments, *flags], processes)
        told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.code == 2 and message in told[0], (flags, result.stderr[-2000:])
        assert not out.exists()
