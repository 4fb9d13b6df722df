"""--async_generate: whoever answers is one rollout behind; a run that goes on has the same answers."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_grpo import command, rows_of, write_prompts

from swift.cli.main import run as run_command
from swift.config.optim import OptimConfig
from swift.engines.transformers.engine import TransformersEngine
from swift.models.load import load_model
from swift.plugins.hooks import orms
from swift.rollout.local import LocalRollout
from swift.rollout.types import Completion, Request

SERVED = ("--async_generate", "true", "--use_vllm", "true", "--vllm_server_host", "127.0.0.1")


class Elsewhere(LocalRollout):
    """A model of its own that takes the weights which it is sent, as a server does."""

    def __init__(self, model: Path, log: list[tuple[str, int]], **terms) -> None:
        self.log = log
        own = load_model(model, dtype=None, attention=None, device=torch.device("cpu"))
        engine = TransformersEngine(own, OptimConfig(), learning_rate=0.0, total_steps=1)
        LocalRollout.__init__(self, engine, **terms)

    def update_weights(self, weights, *, version: int) -> None:
        self.log.append(("weights", version))
        names = self.engine.model.load_state_dict({k: v.clone() for k, v in weights}, strict=False)
        assert not names.unexpected_keys
        self.version = version

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        answers = LocalRollout.generate(self, requests)
        self.log.append(("answered", self.version))
        return answers


@pytest.fixture
def forgetful(monkeypatch) -> Iterator[None]:
    """Plugins that a run in this process loads are not there for the tests after it."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    modules, names = set(sys.modules), set(orms)
    yield
    for name in set(orms) - names:
        del orms[name]
    sys.modules.pop("spacing", None)
    assert not {name for name in set(sys.modules) - modules if "pytest-of-" in str(sys.modules[name])}


@pytest.fixture
def log(monkeypatch, forgetful) -> list[tuple[str, int]]:
    """What the one who answers was asked to do; a run in this process talks to it in place of a server."""
    told: list[tuple[str, int]] = []

    def start(run, ready, engine, ranks, context):
        terms = {"tokenizer": ready.tokenizer, "stop_token_ids": [2], "context": context, "max_rows": 64}
        return Elsewhere(ready.model_path, told, **terms)

    monkeypatch.setattr("swift.train.run_online.start_answers", start)
    monkeypatch.setattr("swift.train.rollouts.check_vllm", lambda flag: None)
    return told


def test_answers_come_from_the_weights_of_the_rollout_before(tiny_llama_dir, tmp_path, log):
    """Two steps a rollout: checkpoints fall within one and between two; an evaluation waits for answers."""
    write_prompts(tmp_path)
    flags = (*SERVED, "--max_steps", "6", "--save_steps", "1", "--steps_per_generation", "2")
    flags = (
        *flags,
        "--per_device_train_batch_size",
        "8",
        "--eval_steps",
        "4",
        "--split_dataset_ratio",
        "0.1",
    )
    flags = (*flags, "--rollout_importance_sampling_mode", "token_truncate", "--add_version", "false")
    whole = tmp_path / "whole"
    assert run_command(command(tiny_llama_dir, tmp_path, whole, *flags, "--log_completions", "true")) == 0
    assert [version for what, version in log if what == "weights"] == [0, 2, 4, 4, 6]  # and two evaluations
    assert [version for what, version in log if what == "answered"] == [0, 0, 2, 4, 6]
    apart = [row["rollout/logp_diff_max"] for row in rows_of(whole)]
    assert apart[0] < 1e-5 < 1e-3 < min(apart[1:])  # the third is as far behind as the second
    kept = [json.loads(line)["completion"] for line in (whole / "completions.jsonl").read_text().splitlines()]
    for step in (2, 3):
        again, checkpoint = tmp_path / f"from-{step}", whole / f"checkpoint-{step}"
        given = ["rlhf", "--resume_from_checkpoint", str(checkpoint), "--output_dir", str(again)]
        assert run_command([*given, "--add_version", "false"]) == 0
        ours, theirs = (load_file(run / "checkpoint-6" / "model.safetensors") for run in (again, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        lines = (again / "completions.jsonl").read_text().splitlines()
        assert [json.loads(line)["completion"] for line in lines] == kept[step // 2 + step % 2 :]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--async_generate", "true"), "--async_generate true needs --vllm_mode server"),
        ((*SERVED, "--multi_turn_scheduler", "math_tip_trick"), "does not go with conversations of several"),
    ],
)
def test_mistakes_are_one_line(tiny_llama_dir, tmp_path, capsys, flags, message):
    write_prompts(tmp_path)
    assert run_command(command(tiny_llama_dir, tmp_path, tmp_path / "out", *flags)) == 2
    assert message in capsys.readouterr().err
