"""GRPO with conversations of several turns, environments and reward models, as a user runs it."""

import json
from pathlib import Path

import pytest
import torch
from test_grpo import command, rows_of, write_prompts
from test_sft import only_run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TURNS = """
from swift.plugin import Env, MultiTurnScheduler, envs, multi_turns


class Again(MultiTurnScheduler):
    def check_finished(self, request, choice, turn):
        return False

    def step(self, request, choice, turn):
        request.messages.append({"role": "user", "content": "More, please."})
        return {"infer_request": request, "rollout_infos": {"asked": turn}}


class Breaks(Again):
    def step(self, request, choice, turn):
        return super().step(request, choice, turn) if request.data_dict["solution"] == "no" else 1 / 0


class Spacing(Env):
    async def reset(self, config):
        return config.messages[-1]["content"] + " In spaces!", {}, None

    def step(self, action):
        return "Again.", action[-1]["content"].count(" "), len(action) > 4, {}


def asked(completions, rollout_infos, messages, response_token_ids):
    assert all(talk[-1]["content"] == text for talk, text in zip(messages, completions))
    assert all(len(ids) <= 16 for ids in response_token_ids)
    return [float(infos["asked"] + infos["num_turns"]) for infos in rollout_infos]


envs["spacing"] = Spacing
multi_turns["again"], multi_turns["breaks"] = Again, Breaks
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """Prompts, the plugin, a reward model."""
    folder = tmp_path_factory.mktemp("turns")
    write_prompts(folder)
    (folder / "turning.py").write_text(TURNS)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder / "scores")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(folder / "scores")
    return folder


def turns(model: Path, folder: Path, output: Path, *flags: str) -> list[str]:
    words = command(model, folder, output, "--max_steps", "2", "--learning_rate", "1e-3", *flags)
    at = words.index("--external_plugins") + 1
    return [*words[: at + 1], str(folder / "turning.py"), *words[at + 1 :]]


def test_only_what_was_sampled_is_trained_on_any_layout(workers, tiny_llama_dir, folder, tmp_path):
    flags = ("--multi_turn_scheduler", "again", "--max_turns", "2", "--log_completions", "true")
    flags = (*flags, "--reward_funcs", "spaces", f"{folder}/turning.py:asked", "--reward_model")
    flags = (*flags, str(folder / "scores"), "--reward_weights", "1", "0", "0.5")
    seen = []
    for processes in (1, 2):
        size = ("--per_device_train_batch_size", str(16 // processes))
        output = tmp_path / str(processes)
        result = workers.run(turns(tiny_llama_dir, folder, output, *flags, *size), processes=processes)
        assert result.code == 0, result.stderr[-3000:]
        rows = rows_of(only_run(output))
        assert len(rows) == 2
        for row in rows:
            # Where the sampler's log-probabilities are those of the trainer, tokens and mask are in place.
            assert row["rollout/logp_diff_max"] < 1e-5
            assert row["rewards/asked/mean"] == 3 and row["rewards/asked/std"] == 0
            weighed = row["rewards/Spaces/mean"] + 0.5 * row["rewards/scores/mean"]
            assert row["reward"] == pytest.approx(weighed)
            assert 8 < row["completions/max_length"] <= 16
        seen.append([(row["loss"], row["grad_norm"], row["reward"]) for row in rows])
    assert seen[1] == [pytest.approx(row, abs=1e-6) for row in seen[0]]


def test_environments_reward(workers, tiny_llama_dir, folder, tmp_path):
    flags = ("--use_gym_env", "true", "--gym_env", "spacing", "--log_completions", "true")
    words = turns(tiny_llama_dir, folder, tmp_path, *flags)
    at = words.index("--reward_funcs")
    result = workers.run([*words[:at], *words[at + 2 :]])
    assert result.code == 0, result.stderr[-3000:]
    rows = rows_of(only_run(tmp_path))
    assert rows[0]["reward"] == pytest.approx(rows[0]["rewards/gym_reward/mean"])
    kept = json.loads((only_run(tmp_path) / "completions.jsonl").read_text().splitlines()[0])
    assert sum(kept["gym_reward"]) / 16 == pytest.approx(rows[0]["reward"])


def test_a_scheduler_that_fails_on_one_process_ends_both(workers, tiny_llama_dir, folder, tmp_path):
    flags = ("--multi_turn_scheduler", "breaks", "--num_generations", "2", "--train_dataloader_shuffle")
    flags = (*flags, "false", "--per_device_train_batch_size", "2")
    words = turns(tiny_llama_dir, folder, tmp_path, *flags)
    rows = (folder / "prompts.jsonl").read_text().splitlines()
    one = tmp_path / "prompts.jsonl"
    one.write_text("\n".join(rows[:2]))
    words[words.index("--dataset") + 1] = str(one)
    result = workers.run(words, processes=2, timeout_seconds=120)
    assert result.codes[0] == 2  # the second one has failed, which then ends by itself or is ended
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --multi_turn_scheduler breaks: step, ")
    assert line.endswith("prompts.jsonl line 2: ZeroDivisionError: division by zero (turning.py line 16)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reward_model", "MODEL"), "--reward_model MODEL is a language model without a score head"),
        (("--max_turns", "3"), "--max_turns has no effect without --multi_turn_scheduler"),
        (("--multi_turn_scheduler", "agian"), "no multi-turn scheduler is called agian"),
        (
            ("--multi_turn_scheduler", "again", "--sequence_parallel_size", "2"),
            "--sequence_parallel_size does not go with conversations of several turns yet",
        ),
    ],
)
def test_mistakes_end_before_weights_load(workers, tiny_llama_dir, folder, tmp_path, flags, message):
    flags = [flag.replace("MODEL", str(tiny_llama_dir)) for flag in flags]
    result = workers.run(turns(tiny_llama_dir, folder, tmp_path, *flags))
    assert result.code == 2 and f"error: {message.replace('MODEL', str(tiny_llama_dir))}" in result.stderr
    assert "rollouts:" not in result.stderr
