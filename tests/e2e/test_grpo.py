"""`swift rlhf --rlhf_type grpo` as a user runs it, on a tiny model with rewards that it can learn."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sft import only_run, read_log

PLUGIN = '''
from swift.plugin import ORM, orms


class Spaces(ORM):
    """The share of an answer's characters that are spaces."""

    def __call__(self, completions, **kwargs):
        return [text.count(" ") / max(len(text), 1) for text in completions]


def judged_rows(completions, solution, **kwargs):
    return [float(len(text)) if right == "yes" else None for text, right in zip(completions, solution)]


def broken(completions, **kwargs):
    return [1 / len(text.replace("x", "")) - kwargs["missing"][0] for text in completions]


def odd(completions, solution, **kwargs):
    return [float(len(text) % 2) if right == "yes" else 0.0 for text, right in zip(completions, solution)]


orms["odd"] = odd
orms["spaces"], orms["judged_rows"], orms["broken"] = Spaces, judged_rows, broken
'''


def write_prompts(folder: Path, count: int = 24) -> tuple[Path, Path]:
    data, plugin = folder / "prompts.jsonl", folder / "spacing.py"
    rows = [
        {
            "messages": [{"role": "user", "content": f"Say {i} {'please ' * (i % 4)}"}],
            "solution": "yes" if i % 2 else "no",
        }
        for i in range(count)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plugin.write_text(PLUGIN)
    return data, plugin


def command(model: Path, folder: Path, output: Path, *flags: str) -> list[str]:
    data, plugin = folder / "prompts.jsonl", folder / "spacing.py"
    return [
        "rlhf", "--rlhf_type", "grpo", "--model", str(model), "--dataset", str(data),
        "--external_plugins", str(plugin), "--reward_funcs", "spaces", "--num_generations", "4",
        "--per_device_train_batch_size", "16", "--max_completion_length", "8", "--temperature", "1",
        "--logging_steps", "1", "--report_to", "none", "--train_type", "full", "--learning_rate", "5e-3",
        "--output_dir", str(output), *flags,
    ]  # fmt: skip


def rows_of(run: Path) -> list[dict]:
    return [row for row in read_log(run) if "reward" in row]


def test_rewards_rise_and_the_log_tells_the_truth(workers, tiny_llama_dir, tmp_path):
    write_prompts(tmp_path)
    flags = ("--max_steps", "16", "--log_completions", "true", "--reward_funcs", "spaces", "judged_rows")
    flags = (*flags, "--report_to", "tensorboard", "--wandb_log_unique_prompts", "true")
    flags = (*flags, "--reward_weights", "1", "0", "--split_dataset_ratio", "0.1")
    flags = (*flags, "--learning_rate", "2e-2", "--lr_scheduler_type", "constant", "--log_entropy", "true")
    result = workers.run(command(tiny_llama_dir, tmp_path, tmp_path / "out", *flags, "--eval_steps", "8"))
    assert result.code == 0, result.stderr[-3000:]
    assert (
        "rollouts: 4 prompts x 4 answers = 16 answers (16 x 1 micro-batches x 1 process(es))" in result.stderr
    )
    run = only_run(tmp_path / "out")
    rows = rows_of(run)
    first, last = rows[0], rows[-1]
    assert (
        sum(row["reward"] for row in rows[:4]) / 4 < 0.15 < 0.35 < sum(row["reward"] for row in rows[-4:]) / 4
    )
    # The policy has not moved since it answered, and the reference is the policy.
    assert first["kl"] == pytest.approx(0, abs=1e-9) and last["kl"] > 1e-4
    assert {row["clip_ratio/region_mean"] for row in rows} == {0.0}
    assert max(row["rollout/logp_diff_max"] for row in rows) < 1e-5
    assert first["loss"] == pytest.approx(0, abs=1e-6)  # advantages of a group add up to 0
    assert first["rewards/Spaces/mean"] == pytest.approx(first["reward"])
    assert first["completions/max_length"] <= 8 and 0 <= first["completions/clipped_ratio"] <= 1
    assert {
        "reward_std",
        "frac_reward_zero_std",
        "rewards/Spaces/std",
        "rewards/judged_rows/mean",
        "entropy/mean",
    } <= first.keys()
    assert {"time/rollout", "time/reward", "time/score", "time/update"} <= first.keys()
    kept = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == list(range(16)) and len(kept[0]["completion"]) == 16
    assert sum(kept[0]["Spaces"]) / 16 == pytest.approx(first["reward"])
    events = EventAccumulator(str(run / "runs"), size_guidance={"tensors": 0})
    events.Reload()
    tables = events.Tensors("train/completions/text_summary")
    assert [event.step for event in tables] == list(range(1, 17))
    shown = tables[0].tensor_proto.string_val[0].decode().splitlines()
    cells = [cell.strip() for cell in shown[2].strip("| ").split(" | ")]
    assert len(shown) == 2 + 4 and shown[0].startswith("| prompt | completion | finish_reason | Spaces |")
    assert cells[0] == "user: " + kept[0]["prompt"][0][-1]["content"].strip()
    assert float(cells[-1]) == kept[0]["advantages"][0]
    asked = [messages[-1]["content"] for messages in kept[0]["prompt"]]
    judged = [value is not None for value in kept[0]["judged_rows"]]
    assert judged == [int(text.split()[1]) % 2 == 1 for text in asked]  # None for the others
    for start in range(0, 16, 4):
        assert sum(kept[0]["advantages"][start : start + 4]) == pytest.approx(0, abs=1e-6)
    evaluated = [row for row in read_log(run) if "eval_reward" in row]
    assert len(evaluated) == 2 and evaluated[1]["eval_reward"] > evaluated[0]["eval_reward"]
    assert (run / "best").resolve().name == "checkpoint-16"


@pytest.mark.slow
def test_no_layout_changes_what_is_learnt(workers, tiny_qwen3_dir, tmp_path):
    """Micro-batches, processes and slices only cut a rollout up; a group may be spread over processes."""
    write_prompts(tmp_path)
    reference = None
    for name, processes, flags in (
        ("one", 1, ("--per_device_train_batch_size", "8")),
        ("small", 1, ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")),
        ("ddp", 2, ("--per_device_train_batch_size", "4")),
        (
            "fsdp",
            2,
            ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", "--fsdp", "fsdp2"),
        ),
    ):
        arguments = command(tiny_qwen3_dir, tmp_path, tmp_path / name, "--max_steps", "4", *flags)
        result = workers.run([*arguments, "--num_generations", "8", "--save_strategy", "no"], processes)
        assert result.code == 0, result.stderr[-3000:]
        rows = rows_of(only_run(tmp_path / name))
        found = [
            [row[key] for key in ("reward", "grad_norm", "kl", "completions/mean_length")] for row in rows
        ]
        reference = reference or found
        for ours, theirs in zip(found, reference, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6), name


def test_a_killed_run_goes_on_within_a_rollout(workers, tiny_llama_dir, tmp_path):
    """Two optimizer steps a pass, two passes: checkpoints fall between steps that share their answers."""
    write_prompts(tmp_path)
    flags = (
        "--max_steps",
        "10",
        "--save_steps",
        "1",
        "--num_iterations",
        "2",
        "--steps_per_generation",
        "2",
        "--train_type",
        "lora",
    )
    whole = command(tiny_llama_dir, tmp_path, tmp_path / "whole", *flags, "--add_version", "false")
    assert workers.run(whole).code == 0
    assert len(rows_of(tmp_path / "whole")) == 3  # of ten steps four learn from one rollout
    for step in (3, 5):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        result = workers.run(
            [
                "rlhf",
                "--resume_from_checkpoint",
                str(checkpoint),
                "--output_dir",
                str(tmp_path / f"from-{step}"),
                "--add_version",
                "false",
            ]
        )
        assert result.code == 0, result.stderr[-3000:]
        (ours,), (theirs,) = (
            [*(tmp_path / name / "checkpoint-10").glob("adapter*.safetensors")]
            for name in (f"from-{step}", "whole")
        )
        ours, theirs = load_file(ours), load_file(theirs)
        assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reward_funcs", "spaced"), "no reward is called spaced"),
        (("--reward_funcs", "broken"), "--reward_funcs broken: "),
        (("--num_generations", "5"), "a rollout has 16 answers"),
        (("--num_generations", "1"), "--num_generations 1 leaves nothing to compare an answer with"),
        (
            ("--steps_per_generation", "3", "--gradient_accumulation_steps", "2"),
            "--steps_per_generation 3 is not a multiple of --gradient_accumulation_steps 2",
        ),
        (("--temperature", "0"), "--temperature 0 gives every prompt the same answer"),
        (("--rpo_alpha", "1"), "--rpo_alpha has no effect with --rlhf_type grpo"),
        (("--streaming", "true", "--max_steps", "2"), "--streaming true does not go with --rlhf_type grpo"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(workers, tiny_llama_dir, tmp_path, flags, message):
    write_prompts(tmp_path)
    result = workers.run(command(tiny_llama_dir, tmp_path, tmp_path / "out", "--max_steps", "2", *flags))
    assert result.code == 2, result.stderr[-3000:]
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_groups_that_teach_nothing_are_sampled_again(workers, tiny_llama_dir, tmp_path):
    write_prompts(tmp_path)
    flags = (
        "--reward_funcs",
        "odd",
        "--dynamic_sample",
        "true",
        "--max_steps",
        "3",
        "--loss_type",
        "dapo",
        "--epsilon_high",
        "0.28",
        "--overlong_filter",
        "true",
        "--beta",
        "0",
    )
    result = workers.run(
        command(tiny_llama_dir, tmp_path, tmp_path / "out", *flags, "--log_completions", "true"), 2
    )
    assert result.code == 0, result.stderr[-3000:]
    run = only_run(tmp_path / "out")
    for row, line in zip(rows_of(run), (run / "completions.jsonl").read_text().splitlines(), strict=True):
        kept = json.loads(line)
        groups = [kept["odd"][i : i + 4] for i in range(0, 32, 4)]
        useful = sum(len(set(group)) > 1 for group in groups)
        assert (
            useful / 8
            == pytest.approx(row["dynamic_sample/kept"])
            == pytest.approx(1 - row["frac_reward_zero_std"])
        )


@pytest.mark.slow
def test_ppo_learns_with_a_value_model_and_goes_on(workers, tiny_llama_dir, tmp_path):
    """The same reward; the value model learns what answers are worth, and both are in a checkpoint."""
    write_prompts(tmp_path)
    flags = ("--rlhf_type", "ppo", "--max_steps", "24", "--learning_rate", "2e-2", "--save_steps", "10")
    arguments = command(tiny_llama_dir, tmp_path, tmp_path / "out", *flags, "--num_ppo_epochs", "2")
    arguments = [*arguments, "--lr_scheduler_type", "constant", "--kl_coef", "0.01", "--add_version", "false"]
    i = arguments.index("--num_generations")
    del arguments[i : i + 2]
    result = workers.run(arguments)
    assert result.code == 0, result.stderr[-3000:]
    rows = rows_of(tmp_path / "out")
    assert sum(row["reward"] for row in rows[-3:]) > 2 * sum(row["reward"] for row in rows[:3])
    log = [row for row in read_log(tmp_path / "out") if "value/loss" in row]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[1]["clip_ratio/region_mean"] > 0
    assert sum(row["value/loss"] for row in log[-4:]) < sum(row["value/loss"] for row in log[:4])
    assert (tmp_path / "out" / "checkpoint-20" / "value_model" / "model.safetensors").is_file()
    checkpoint = tmp_path / "out" / "checkpoint-10"
    again = ["rlhf", "--resume_from_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "again")]
    assert workers.run([*again, "--add_version", "false"]).code == 0
    for name in ("model.safetensors", "value_model/model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoint-24" / name) for run in ("again", "out"))
        assert all((ours[key] == theirs[key]).all() for key in theirs)
