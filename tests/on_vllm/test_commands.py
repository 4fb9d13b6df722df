"""Commands that run vLLM in their own process or in several: the real package, on a CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_rollout import load

from swift.config.optim import OptimConfig
from swift.config.tuner import TunerConfig
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora
from swift.rollout.vllm_client import Server

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


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[int]:
    """The port of `swift rollout`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    command = ["rollout", "--model", str(checkpoint[0]), "--torch_dtype", "float32", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "swift", *command, "--vllm_engine_kwargs", '{"max_logprobs": 30}', *TIGHT],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    yield port
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_of(folder: Path, key: str) -> list[dict]:
    return [row for row in map(json.loads, (folder / "logging.jsonl").open()) if key in row]


def test_a_server_teaches_what_its_model_would_beside_the_student(checkpoint, server, tmp_path):
    """The first test with the server: later ones send it other weights."""
    data = tmp_path / "chats.jsonl"
    chats = ({"query": question, "response": f"{question} Paris."} for question in QUESTIONS)
    data.write_text("".join(json.dumps(row) + "\n" for row in chats))
    found = []
    url = ("--teacher_model_server", f"http://127.0.0.1:{server}")
    Server(url[1], timeout_seconds=900).wait()  # a run does not wait for a teacher
    for name, teacher in (("near", ("--teacher_model", checkpoint[0])), ("far", url)):
        run(
            "rlhf", "--rlhf_type", "gkd", "--model", checkpoint[0], "--adapters", checkpoint[1], *teacher,
            "--dataset", data, "--gkd_logits_topk", 30, "--lmbda", 0, "--max_steps", 3, "--logging_steps", 1,
            "--torch_dtype", "float32", "--split_dataset_ratio", 0, "--learning_rate", 1e-3,
            "--output_dir", tmp_path / name, "--add_version", "false", "--lora_dropout", 0,
        )  # fmt: skip
        found.append([row["loss"] for row in log_of(tmp_path / name, "loss")])
    assert (
        len(found[0]) == 3 and found[0][0] > 1e-4 and found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-6)
    )


def test_a_server_answers_while_the_rollout_before_is_learnt_from(checkpoint, server, rows, tmp_path):
    """Its weights are one rollout old; a run that goes on has the same answers."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "from swift.rewards import orms\n\n"
        "orms['distinct'] = lambda completions, **columns: [len(set(text)) / 10 for text in completions]\n"
    )
    common = (
        "--rlhf_type", "grpo", "--model", checkpoint[0], "--dataset", rows, "--external_plugins", reward,
        "--reward_funcs", "distinct", "--train_type", "full", "--num_generations", 4,
        "--split_dataset_ratio", 0,
        "--per_device_train_batch_size", 8, "--max_completion_length", 8, "--learning_rate", 1e-3,
        "--max_steps", 4, "--save_steps", 1, "--logging_steps", 1, "--log_completions", "true",
        "--use_vllm", "true", "--vllm_server_host", "127.0.0.1", "--vllm_server_port", server,
        "--vllm_server_timeout", 900, "--torch_dtype", "float32", "--add_version", "false",
    )  # fmt: skip
    for name, flags in (("plain", ()), ("ahead", ("--async_generate", "true"))):
        run("rlhf", *common, "--output_dir", tmp_path / name, *flags)
    apart = {name: [row["rollout/logp_diff_max"] for row in log_of(tmp_path / name, "reward")]
             for name in ("plain", "ahead")}  # fmt: skip
    assert max(apart["plain"]) < 1e-4 and apart["ahead"][0] < 1e-4 < 1e-3 < min(apart["ahead"][1:])
    checkpoint_2 = tmp_path / "ahead" / "checkpoint-2"
    given = ("--resume_from_checkpoint", checkpoint_2, "--output_dir", tmp_path / "again")
    run("rlhf", *given, "--add_version", "false")
    lines = [[json.loads(line)["completion"] for line in (tmp_path / name / "completions.jsonl").open()]
             for name in ("ahead", "again")]  # fmt: skip
    assert lines[1] == lines[0][2:]
    ours, theirs = (
        load_file(tmp_path / n / "checkpoint-4" / "model.safetensors") for n in ("again", "ahead")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
