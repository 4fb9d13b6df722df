"""`swift plan`: its formulas against what was measured, its words, and the cost lines of recipes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swift.cli.main import run
from swift.cli.plan_memory import GIB, RATES, Job, find_peak, find_rate, tokens_per_second
from swift.cli.plan_shape import Shape, find_shape, shape_of
from swift.config.layout import Layout
from swift.utils import env

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TRAINED = 0.7  # of the tokens in the benchmarks
COST = re.compile(r'^# Cost \(SWIFT_PLAN="(.*?)"(?:, (.*))?\):\n#   (.*)$', re.MULTILINE)
PEAK = 989e12


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def cut(shape: Shape, layers: int | None) -> Shape:
    return shape_of({**shape.config, "num_hidden_layers": layers or shape.layers})


def sft_job(row: dict[str, Any]) -> Job:
    shape = cut(find_shape(row.get("shape", "qwen3-8b")), row.get("layers"))
    kind, _, slicing = row.get("tuner", "full").partition("-")
    world = row.get("processes") or row.get("gpus") or 1
    tokens = row.get("tokens", 8192)
    return Job(
        shape, Layout(world=world), slicing=slicing or ("fsdp2" if "gpus" in row and world > 1 else "none"),
        adapters=8 * shape.layers * shape.lora if kind == "lora" else 0, tokens=tokens,
        trained=int(TRAINED * tokens),
    )  # fmt: skip


def megatron_job(row: dict[str, Any]) -> Job:
    layout = Layout(
        world=row["gpus"], tensor=row.get("tensor", 1), expert=row.get("expert", 1),
        sequence=row.get("sequence", False),
    )  # fmt: skip
    job = replace(
        sft_job(row), layout=layout, megatron=True, slicing="distributed", moment_bytes=8,
        recomputed=float(row.get("recompute", False)),
    )  # fmt: skip
    # As the engine was before these: float32 copies of the logits, and AdamW in many kernels.
    before = "before" in row.get("note", "")
    return replace(job, logit_bytes=12 if before else 6, spare_bytes=4 if before else 0)


def test_peaks_are_those_that_were_measured() -> None:
    """Every recorded run of both engines, but for the padded layout, within 6 %; most within 1.5 %."""
    wrong = []
    for name in ("gpu_sft_step-2xh200", "gpu_sft_step-h100", "gpu_megatron_step-h200"):
        for row in rows(name):
            if row.get("layout") == "padded":
                continue
            job = (megatron_job if row.get("engine") == "megatron" else sft_job)(row)
            measured = row.get("peak_gib") or row["memory_gib"]
            wrong.append(sum(find_peak(job)[1].values()) / GIB / measured - 1)
            if "parameters" in row:
                assert job.shape.parameters == pytest.approx(row["parameters"], rel=1e-5)
    assert len(wrong) == 24
    assert max(map(abs, wrong)) < 0.06
    assert sum(abs(part) < 0.015 for part in wrong) == 23


def test_rates_are_those_that_were_measured() -> None:
    for name, rates in RATES.items():
        measured = {round(row["mfu"], 3) for row in rows(name) if row.get("mfu")}
        unknown = {rate for rate in rates.values() if round(rate, 3) not in measured}
        assert unknown <= ({0.211} if "sft" in name else set())  # of ZeRO-3 only tokens/s are recorded
    fsdp, zero = (
        [r for r in rows("gpu_sft_step-2xh200") if r["tuner"] == f"full-{kind}"][-1]
        for kind in ("fsdp2", "zero3")
    )
    times = zero["tokens_per_second_per_device"] / 6571
    assert fsdp["mfu"] and times * 0.3034 == pytest.approx(0.211, abs=1e-3)
    # The recorded MFU and tokens/s belong to one count of FLOPs, which is ours: 8192 tokens in 8 rows.
    for row in rows("gpu_sft_step-2xh200")[:3]:
        job = sft_job(row)
        speed = tokens_per_second(job, PEAK / 1e12, 1024) * row["mfu"] / find_rate(job)[0]
        assert speed == pytest.approx(row["tokens_per_second_per_device"], rel=0.06)


def test_sizes_that_others_publish() -> None:
    """DeepSeek-V3: 671 G parameters, 37 G for a token (arXiv:2412.19437); the table's by their names."""
    deepseek = shape_of(
        {
            "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
            "first_k_dense_replace": 3, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    assert deepseek.parameters / 1e9 == pytest.approx(671, abs=1)
    assert deepseek.active / 1e9 == pytest.approx(37, abs=1)
    known = {
        "Qwen/Qwen2.5-72B-Instruct": 72.7, "qwen3-32b": 32.8, "Qwen/Qwen3-30B-A3B-Base": 30.5,
        "Llama-3.1-8B": 8.03,
        "Qwen3-235B-A22B-Instruct-2507": 235, "Qwen2.5-7B": 7.62, "Mixtral-8x7B": 46.7, "Llama-3.2-1B": 1.24,
    }  # fmt: skip
    for name, size in known.items():
        assert find_shape(name).parameters / 1e9 == pytest.approx(size, rel=0.005), name


def test_layouts_cut_up_what_they_should() -> None:
    """Tensor parallelism halves all but what AdamW's copies share; the first stages keep more activations."""
    shape = find_shape("qwen3-8b")
    job = Job(shape, Layout(), "distributed", True, moment_bytes=8, spare_bytes=0, logit_bytes=6, tokens=4096)
    whole = find_peak(job)[1]
    half = find_peak(replace(job, layout=Layout(world=2, tensor=2, sequence=True)))[1]
    assert {name: size / 2 for name, size in whole.items()} == pytest.approx(half)
    copies = find_peak(replace(job, layout=Layout(world=2)))[1]
    assert copies["optimizer"] == whole["optimizer"] / 2 and copies["weights"] == whole["weights"]
    two = replace(job, layout=Layout(world=2, pipeline=2, layers=(18, 18)), recomputed=0.0)
    one = replace(two, layout=Layout())
    # Stage 0 has half of the layers of two micro-batches.
    assert find_peak(two)[1]["activations"] == pytest.approx(find_peak(one)[1]["activations"])
    assert find_rate(two)[0] == find_rate(one)[0] / 2  # one micro-batch: each stage waits for the other
    assert find_rate(replace(two, micro_batches=9))[0] == pytest.approx(find_rate(one)[0] * 0.9)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    code = run(["plan", *words])
    return code, capsys.readouterr().out.splitlines()


SFT = ["swift", "sft", "--model", "Qwen/Qwen3-8B", "--dataset", "a/b#1000", "--max_length", "4096"]


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpu", "H100-80G", "--gpus", "2", "--row_tokens", "512", *SFT, "--train_type", "full"]
    code, lines = planned(capsys, *words)
    assert code == 1
    assert lines[0] == "model     8.19 G parameters, all of them trained"
    assert lines[1] == "GPUs      2 x H100-80G: data 2, a copy each"
    assert lines[-5].endswith("of 79.1: DOES NOT FIT")
    assert re.fullmatch(r"advice    --fsdp fsdp2: \d\d\.\d GiB", lines[-4])
    code, lines = planned(capsys, *words, "--fsdp", "fsdp2", "--num_train_epochs", "1")
    assert code == 0 and lines[1] == "GPUs      2 x H100-80G: data 2, fsdp2 over all"
    parts = {line[10:34].strip(): float(line.split()[-1]) for line in lines[3:10] if "of" not in line}
    together = next(line for line in lines if "together" in line)
    assert float(together.split()[1]) == pytest.approx(sum(parts.values()), abs=0.3)
    # 1,000 rows, 16 a step; 6 FLOPs a parameter and token, MFU 30.7 % of 989 TFLOP/s
    assert "63 steps of 8,192 tokens; " in lines[-1] and lines[-1].endswith("(estimate, MFU 31 %)")
    speed = 0.307 * PEAK / find_shape("qwen3-8b").flops(512, full=True)
    assert f"{speed:,.0f} tokens/s a GPU" in "".join(lines)


def test_other_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind `swift launch`, by variable in front of any script, mixtures, and answers that are sampled."""
    monkeypatch.setenv("SWIFT_PLAN", "--gpu H200 --rows 64 --row_tokens 1000")
    moe = ["sft", "--model", "Qwen/Qwen3-30B-A3B", "--dataset", "x", "--max_length", "4096"]
    layout = [
        "--tensor_model_parallel_size",
        "2",
        "--expert_model_parallel_size",
        "8",
        "--sequence_parallel",
        "true",
    ]
    assert run(["launch", "--ips", "a,b", "megatron", *moe, *layout]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "model     30.53 G parameters, 3.04 G for a token, all of them trained",
        "GPUs      16 x H200: tensor 2, expert 8, data 8, optimizer sliced",
    ]
    assert run(["sft", "--model", "Qwen3-1.7B", "--dataset", "x"]) == 0
    assert "adapters trained" in capsys.readouterr().out
    monkeypatch.delenv("SWIFT_PLAN")
    grpo = [
        "swift", "rlhf", "--rlhf_type", "grpo", "--model", "Qwen3-1.7B", "--dataset", "x#100", "--train_type",
        "full", "--reward_funcs", "accuracy", "--max_completion_length", "1000", "--max_length", "500",
        "--per_device_train_batch_size", "8",
    ]  # fmt: skip
    code, lines = planned(capsys, "--gpu", "H100-80G", "--gpus", "1", "--row_tokens", "100", *grpo)
    assert code == 0 and "guessed   every answer has all 1,000 tokens that it may have" in lines
    assert any(line.endswith("s for answers, 8 at once on a GPU: 0.9 GiB of cache") for line in lines)
    # 100 prompts x 8 answers, 8 a step, three epochs; 1,100 tokens an answer with its prompt
    assert "; 300 steps of 8,800 tokens; " in lines[-1]


def test_rows_of_local_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"query": "' + "a" * 1000 + '", "response": "b"}\n' * 1 + ("{}" + " " * 1000 + "\n") * 99
    )
    code, lines = planned(
        capsys, "--gpu", "H200", "--gpus", "1", "swift", "sft", "--model", "Qwen3-8B", "--dataset", str(path)
    )
    assert code == 1 or "21 steps" in lines[-1]
    assert any(line == "guessed   a row has 251 tokens, one for 4 bytes of a file" for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "swift plan needs a training command"),
        (["swift", "infer", "--model", "x"], "swift plan needs a training command"),
        (["--gpu", "H100", *SFT], "--gpu must be one of A10-24G, "),
        (["--gpu", "H200", "swift", "sft", "--model", "a/b", "--dataset", "x"], "a/b is no directory with"),
        (["--gpu", "H200", "swift", "sft", "--model", "a/b"], "--dataset is missing"),
        (
            ["--gpu", "H200", "--gpus", "3", "megatron", *SFT[1:], "--tensor_model_parallel_size", "2"],
            "--tensor_model_parallel_size 2 does not divide the 3 process(es)",
        ),
        (["--gpu", "H200", "--gpus", "3", *SFT, "--sequence_parallel_size", "2"], "--sequence_parallel_size"),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_the_gpus_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("NPROC_PER_NODE", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    assert run(["plan", *SFT]) == 2 or env.count_gpus()
    capsys.readouterr()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81000'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    code, lines = planned(capsys, *SFT)
    assert code == 0 and lines[1] == "GPUs      2 x H100-80G: data 2, a copy each"
    tool.write_text("#!/bin/sh\necho 'Voodoo 2, 12, 12'\n")
    assert run(["plan", *SFT]) == 2
    assert capsys.readouterr().err.startswith(
        "error: Voodoo 2 is not known: for which one shall it be planned?"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.sh")), ids=lambda path: path.stem)
def test_recipes_say_what_they_cost(path: Path, tmp_path: Path) -> None:
    """The line in the recipe is the last one of the plan that it names."""
    found = COST.search(path.read_text())
    assert found, "a recipe states its cost"
    words = [*(found[2] or "").split(), *(["--save", "d", "--dataset", "f"] if "agent" in path.name else [])]
    bin_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": bin_path, "SWIFT_PLAN": found[1], "DATASET": "rows.jsonl"}
    environment |= {"IPS": "A,B"} if "A3B" in path.name else {}
    environment.pop("DATASET" if "full" not in path.name else "", None)
    done = subprocess.run(
        ["bash", str(path), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"in short  {found[3]}"
