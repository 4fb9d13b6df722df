"""recipes/: the flags that they take and give, and one of them from two machines' training to an answer."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from workers import Workers

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.sh"))
WRAPPER = [  # as users call it
    "--ssh_password", "<PASSWORD>", "--port", "29900", "--tensor_model_parallel_size", "8",
    "--context_parallel_size", "4", "--max_length", "64000", "--epochs", "1", "--save_interval", "50",
]  # fmt: skip
NAMES = (
    "model", "micro_batch_size", "global_batch_size", "tensor_model_parallel_size", "context_parallel_size",
    "sequence_parallel", "max_length", "max_epochs", "save_interval",
)  # fmt: skip
ALIASES = {
    "micro_batch_size": "per_device_train_batch_size", "max_epochs": "num_train_epochs",
    "save_interval": "save_steps",
}  # fmt: skip


def call(recipe: str, directory: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "SWIFT_OFFLINE": "1", **variables}
    command = ["bash", str(ROOT / "recipes" / recipe), *words]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def values(recipe: str, directory: Path, *words: str, **variables: str) -> dict[str, object]:
    result = call(recipe, directory, *words, "--print_config", "true", **variables)
    assert result.returncode == 0, result.stderr
    # Behind `swift launch` what the command says on stderr is on screen too.
    parsed: dict[str, object] = yaml.safe_load(result.stdout[result.stdout.index("# ") :])
    return parsed


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_clean(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK) and "set -euo pipefail" in path.read_text()
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(path)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("recipe", "micro", "rows"), [("Qwen3_32B_agent_sft.sh", 8, 64), ("Qwen2.5_72B_agent_sft.sh", 4, 32)]
)
def test_the_wrapper_takes_the_flags_that_it_always_had(
    recipe: str, micro: int, rows: int, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    """Through the whole launcher, on this machine as the only node; megatron prints what it was given."""
    (tmp_path / "rows.jsonl").write_text('{"query": "Who?", "response": "I."}\n')
    found = values(
        recipe, tmp_path, "--ips", "127.0.0.1", "--save", "out", "--dataset", "rows.jsonl", *WRAPPER,
        MODEL=str(tiny_qwen3_dir), NPROC_PER_NODE="1",
    )  # fmt: skip
    assert [found[ALIASES.get(name, name)] for name in NAMES] == [
        str(tiny_qwen3_dir), micro, rows, 8, 4, True, 64000, 1, 50,
    ]  # fmt: skip
    assert (found["output_dir"], found["dataset"]) == ("out", ["rows.jsonl"])
    missing = call(recipe, tmp_path, "--ips", "127.0.0.1", "--dataset", "rows.jsonl")
    assert (missing.returncode, missing.stderr) == (2, "error: --save is missing\n")


def test_recipes_of_one_machine(tmp_path: Path) -> None:
    learnt = values("Qwen3_8B_self_cognition.sh", tmp_path, "--max_steps", "3", NAME="Ada")
    assert (learnt["model_name"], learnt["train_type"], learnt["max_steps"]) == (["Ada"], "lora", 3)
    full = values("Qwen3_8B_full_sft.sh", tmp_path, DATASET="rows.jsonl")
    assert (full["train_type"], full["fsdp"], full["packing"]) == ("full", "fsdp2", True)
    grpo = values("Qwen3_8B_grpo.sh", tmp_path, USE_VLLM="false")
    assert (grpo["rlhf_type"], grpo["num_generations"], grpo["use_vllm"]) == ("grpo", 16, False)
    to_mcore = values("tools/export_hf_2_megatron_model.sh", tmp_path, MODEL="a/Qwen3-32B")
    assert (to_mcore["to_mcore"], to_mcore["output_dir"]) == (True, "Qwen3-32B-mcore")
    to_hf = values("tools/export_megatron_2_hf_model.sh", tmp_path, MCORE_MODEL="out/v0/")
    assert (to_hf["to_hf"], to_hf["output_dir"]) == (True, "out/v0-hf")


def arguments_of(recipe: str, directory: Path, *words: str, **variables: str) -> list[str]:
    """What the recipe gives to `swift`."""
    program = directory / "bin" / "swift"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {directory}/arguments\n")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    assert call(recipe, directory, *words, **variables, PATH=path).returncode == 0
    return (directory / "arguments").read_text().split("\0")[:-1]


def write_rows(directory: Path) -> None:
    rows = [{"query": f"Say {i}.", "response": f"{i}, it is.", "solution": str(i)} for i in range(16)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps(directory: Path) -> list[float]:
    """The losses of the run there."""
    lines = [json.loads(line) for line in next(directory.rglob("logging.jsonl")).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


SMALL = ("--max_length", "128", "--max_steps", "2", "--logging_steps", "1", "--torch_dtype", "float32")
FOUR_ANSWERS = (
    "--num_generations", "4", "--per_device_train_batch_size", "4", "--max_completion_length", "8",
    "--gradient_accumulation_steps", "1", "--deepspeed", "zero0",
)  # fmt: skip
TWO = {"NPROC_PER_NODE": "2", "IPS": "127.0.0.1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("Qwen3_8B_self_cognition.sh", ("--gradient_accumulation_steps", "2")),
        ("Qwen3_8B_grpo.sh", FOUR_ANSWERS),
        pytest.param(
            "Qwen3_8B_dapo.sh",
            (*FOUR_ANSWERS, "--steps_per_generation", "2", "--soft_cache_length", "4"),
            marks=pytest.mark.slow_suite,
        ),
    ],
)
def test_recipes_of_one_gpu_in_miniature(
    recipe: str, words: tuple[str, ...], workers: Workers, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path)
    named = {"MODEL": str(tiny_qwen3_dir), "OUTPUT": str(tmp_path / "output"), "USE_VLLM": "false"}
    named |= {} if "cognition" in recipe else {"DATASET": str(tmp_path / "rows.jsonl")}
    result = workers.run(arguments_of(recipe, tmp_path, *SMALL, *words, **named))
    assert result.code == 0, result.stderr[-3000:]
    assert len(steps(tmp_path)) == 2 and next(tmp_path.rglob("checkpoint-2")).is_dir()


@pytest.mark.slow_suite
@pytest.mark.parametrize(
    ("recipe", "family", "words"),
    [
        ("Qwen3_8B_full_sft.sh", "qwen3", ("--gradient_accumulation_steps", "1")),
        (
            "Qwen3_30B_A3B_sft.sh",
            "qwen3_moe",
            ("--global_batch_size", "4", "--save_interval", "2", "--eval_iters", "1"),
        ),
        (
            "Qwen2.5_72B_agent_sft.sh",
            "qwen2",
            (
                "--ips", "127.0.0.1", "--save", "output", "--dataset", "rows.jsonl", "--micro_bs", "2",
                "--global_bs", "4", "--tensor_model_parallel_size", "1", "--context_parallel_size", "2",
                "--save_interval", "2",
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_recipes_of_several_gpus_in_miniature(
    recipe: str, family: str, words: tuple[str, ...], make_tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """On two processes; what has --ips through the launcher."""
    write_rows(tmp_path)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = make_tiny_model_dir(tmp_path, family, **(experts if "moe" in family else {}))
    named = {"MODEL": str(model), "DATASET": "rows.jsonl", "OUTPUT": "output", "EXPERT": "2", **TWO}
    result = call(recipe, tmp_path, *SMALL, *words, "--split_dataset_ratio", "0.2", **named)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert len(steps(tmp_path)) == 2 and next(tmp_path.rglob("checkpoint-2")).is_dir()
