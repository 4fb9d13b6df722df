"""Commands that run vLLM in their own process or in several: the real package, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_rollout import load

from swift.config.optim import OptimConfig
from swift.config.tuner import TunerConfig
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

TIGHT = ("--max_model_len", "400", "--vllm_enforce_eager", "true")
QUESTIONS = ("Who are you?", "What is the capital of France?", "How many hours are in a day?")


@pytest.fixture(scope="module")
def checkpoint(make_tiny_model_dir, tmp_path_factory) -> tuple[Path, Path]:
    """A model, and adapters that change its answers."""
    folder = tmp_path_factory.mktemp("checkpoint")
    directory = make_tiny_model_dir(folder, "qwen3", head_dim=32)
    model = add_lora(load(directory), TunerConfig(lora_rank=4, init_weights="false"), seed=1)
    engine = TransformersEngine(model, OptimConfig(), learning_rate=0.0, total_steps=1)
    (folder / "adapter").mkdir()
    engine.save(folder / "adapter", resumable=False).write()
    return directory, folder / "adapter"


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": question}) + "\n" for question in QUESTIONS))
    return path


def run(*command: object, given: str = "", **environment: str) -> tuple[str, str]:
    """`swift COMMAND`; its result, and what it said."""
    result = subprocess.run(
        [sys.executable, "-m", "swift", *map(str, command)],
        env={**os.environ, **environment}, input=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, result.stderr


def infer(*flags: object, given: str = "", **environment: str) -> str:
    return run("infer", *flags, given=given, **environment)[0]


def read(path: Path) -> list[str]:
    return [json.loads(line)["response"] for line in path.read_text().splitlines()]


def test_rows_are_answered_as_by_the_built_in_engine(checkpoint, rows, tmp_path):
    """Adapters beside the weights, sampled and greedy; and a chat shows what the file has."""
    directory, adapter = checkpoint
    model = ("--model", directory, "--adapters", adapter, "--max_new_tokens", 12)
    greedy = (*model, "--temperature", 0)
    answers = {}
    for backend, flags in (("vllm", TIGHT), ("transformers", ())):
        path = tmp_path / f"{backend}.jsonl"
        asked = ("--val_dataset", rows, "--result_path", path, "--infer_backend", backend)
        infer(*greedy, *asked, *flags)
        answers[backend] = read(path)
    assert answers["vllm"] == answers["transformers"] and len(answers["vllm"]) == len(QUESTIONS)
    shown = infer(*greedy, "--infer_backend", "vllm", *TIGHT, given=f"{QUESTIONS[0]}\nexit\n")
    assert answers["vllm"][0].strip() in shown


def test_two_processes_share_a_model_and_its_rows(checkpoint, rows, tmp_path):
    directory, _ = checkpoint
    texts = []
    for name, flags, environment in (
        ("one", (), {}),
        ("two", ("--tensor_parallel_size", 2), {"NPROC_PER_NODE": "2"}),
    ):
        path = tmp_path / f"{name}.jsonl"
        asked = ("--val_dataset", rows, "--result_path", path, "--infer_backend", "vllm")
        infer(
            "--model",
            directory,
            "--max_new_tokens",
            12,
            "--temperature",
            1,
            *asked,
            *TIGHT,
            *flags,
            **environment,
        )
        texts.append(path.read_text())
    assert texts[0] == texts[1]


def test_a_training_on_two_processes_is_answered_by_both(checkpoint):
    script = Path(__file__).with_name("ranks_answering.py")
    path = os.pathsep.join([str(script.parent), str(script.parents[1]), *sys.path])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    result = subprocess.run(
        [sys.executable, *command, str(checkpoint[0])], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(line for line in result.stdout.splitlines() if "is done" in line) == [
        "rank 0 is done",
        "rank 1 is done",
    ]


def test_answers_that_grpo_learns_from_are_those_of_its_weights(checkpoint, rows, tmp_path):
    """At every step, after every update; where no GPU is left beside the training vLLM is in its process."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "from swift.rewards import ORM, orms\n\n\nclass Distinct(ORM):\n"
        "    def __call__(self, completions, **columns):\n"
        "        return [len(set(text)) / 10 for text in completions]\n\n\norms['distinct'] = Distinct\n"
    )
    command = [
        "rlhf", "--rlhf_type", "grpo", "--model", checkpoint[0], "--dataset", rows,
        "--external_plugins", reward, "--reward_funcs", "distinct", "--lora_dropout", 0,
        "--num_generations", 4, "--per_device_train_batch_size", 8, "--max_completion_length", 8,
        "--learning_rate", 1e-2, "--max_steps", 3, "--logging_steps", 1, "--split_dataset_ratio", 0,
        "--use_vllm", "true", "--vllm_device", "auto", "--sleep_level", 1, *TIGHT,
        "--output_dir", tmp_path / "run", "--add_version", "false",
    ]  # fmt: skip
    shown = run(*command)[1]
    assert "no GPU is left beside the training, so vLLM shares those that it uses" in shown
    lines = (tmp_path / "run" / "logging.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "rollout/logp_diff_max" in row]
    assert len(steps) == 3 and max(step["rollout/logp_diff_max"] for step in steps) < 1e-4
    assert all(step["grad_norm"] > 0 for step in steps)
