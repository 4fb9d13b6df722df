"""Adapters on the Megatron engine take the steps that PEFT's take, whatever layout the model is cut into."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_models import V3
from lora_steps import OPTIM, RATE, STEPS, make_batches, make_objective
from safetensors.torch import load_file
from test_processes import read_curve, write_rows
from transformers import AutoModelForCausalLM

from swift.config.tuner import TunerConfig
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora, load_adapter

RANKS = f"{Path(__file__).parent}/megatron_lora_steps.py"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALL = ("all-linear",)
MODELS = {
    "qwen3": ("qwen3", {}, ALL),
    "deep": ("qwen3", {"num_hidden_layers": 4}, ALL),
    "some": ("llama", {"num_hidden_layers": 2}, ("q_proj", "v_proj", "up_proj", "down_proj")),
    "columns": ("llama", {}, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
    "first": ("llama", {"num_hidden_layers": 2}, r".*layers\.0.*q_proj"),  # the last stage has none
    "moe": ("qwen3_moe", EXPERTS, ALL),
    "latent": ("deepseek_v3", V3, ALL),
    "shared": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 48}, ALL),
}
TP, PP, CP, EP = ({name: 2} for name in ("tensor", "pipeline", "context", "expert"))
SP = TP | {"sequence": True}
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BESIDE = {"moe_shared_expert_overlap": True}


def case(name: str, degrees: dict | None = None, *, sliced: bool = False, **more: Any) -> dict[str, Any]:
    return {"name": name, "degrees": degrees or {}, "chosen": {}, "sliced": sliced, "dropout": 0.0,
            "context": "all_gather"} | more  # fmt: skip


LAYOUTS = {
    1: [
        case("some"),
        case("moe", chosen={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    ],
    2: [
        case("qwen3", TP),
        case("qwen3", SP, chosen=UNIFORM),
        case("some", SP, chosen={"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
        case("deep", PP | {"virtual": 2}),
        case("some", PP),
        case("first", PP),
        case("qwen3", CP),
        case("qwen3", sliced=True),
        case("moe", EP),
        case("moe", SP),
        case("moe", {"expert_tensor": 2}),
        case("shared", SP | {"expert_tensor": 2}),
        case("shared", SP | EP, chosen=BESIDE),
        case("latent", SP | EP, chosen=UNIFORM | {"moe_router_bias_update_rate": 0.0}),
    ],
}


@pytest.fixture(scope="module")
def models(make_tiny_model_dir, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Directories of the models and of adapters for them, each number random."""
    made = {}
    for name, (family, fields, targets) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        path = make_tiny_model_dir(folder, family, **fields)
        model = AutoModelForCausalLM.from_pretrained(path)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            model.save_pretrained(path)
            which = {"target_regex" if isinstance(targets, str) else "target_modules": targets}
            config = TunerConfig(train_type="lora", lora_rank=4, lora_dropout=0, **which)
            model = add_lora(model, config, seed=5)
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder / "adapter")
        made[name] = path, folder / "adapter"
    return made


@pytest.fixture(scope="module")
def expected(models) -> dict[str, dict[str, Any]]:
    """What PEFT and the transformers engine do with each model, on one process."""
    return {name: train(*paths) for name, paths in models.items()}


def train(path: Path, adapter: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = load_adapter(model, adapter, trainable=True)
    engine = TransformersEngine(model, OPTIM, learning_rate=RATE, total_steps=STEPS)
    rows, gradients = [], {}
    for step in range(STEPS):
        sums = engine.forward_backward(make_batches(step), make_objective())
        if step == 0:
            gradients = {
                name.replace(".default.", "."): p.grad.clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        rows.append([sums.means()["loss/tokens"], engine.optim_step().grad_norm])
    with engine.reference():
        reference = engine.measure(make_batches(STEPS), make_objective()).means()["loss/tokens"]
    return {
        "rows": rows,
        "gradients": gradients,
        "parameters": list(engine.num_parameters),
        "eval": engine.measure(make_batches(STEPS), make_objective()).means()["loss/tokens"],
        "reference": reference,
    }


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_takes_the_steps_of_peft(world, models, expected, megatron_workers, tmp_path):
    cases = []
    for i, one in enumerate(LAYOUTS[world]):
        model, adapter = map(str, models[one["name"]])
        cases.append(one | {"model": model, "adapter": adapter, "result": str(tmp_path / f"{i}.json")})
    done = megatron_workers.run(
        [], world, hook=f"{RANKS}:run_cases", hook_arguments={"world": world, "cases": cases}
    )
    assert done.code == 0, done.stderr[-3000:]
    for one in cases:
        found, theirs = json.loads(Path(one["result"]).read_text()), expected[one["name"]]
        about = f"{one['name']} on {one['degrees']}"
        assert found["parameters"][0] == theirs["parameters"][0], about
        for name in ("eval", "reference"):
            assert found[name] == pytest.approx(theirs[name], rel=1e-5), f"{about}: {name}"
        for step, (mine, reference) in enumerate(zip(found["rows"], theirs["rows"], strict=True)):
            assert mine[0] == pytest.approx(reference[0], rel=1e-5), f"{about}: loss of step {step}"
            assert mine[1] == pytest.approx(reference[1], rel=1e-4), f"{about}: gradient norm of step {step}"
        if not one["sliced"]:
            compare(load_file(Path(one["result"]).with_suffix(".safetensors")), theirs["gradients"], about)


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], about: str) -> None:
    assert found.keys() == expected.keys(), about
    for name, theirs in expected.items():
        error = (found[name] - theirs).norm().item()
        assert error <= 1e-5 * max(theirs.norm().item(), 1e-3), f"{about}: {name} {error:.2e}"


def megatron(workers, processes: int, *argv: str) -> str:
    done = workers.run(["megatron", "sft", *argv], processes)
    assert done.code == 0, done.stderr[-3000:]
    return done.stderr


def near(curve: list[tuple[float, float]], other: list[tuple[float, float]]) -> bool:
    pairs = zip(curve, other, strict=True)
    return all(
        a == pytest.approx(b, rel=1e-5) and c == pytest.approx(d, rel=1e-4) for (a, c), (b, d) in pairs
    )


def check_merged(model: Path, adapter: dict[str, torch.Tensor], merged: Path) -> None:
    """--merge_lora: every weight is the published one, plus its adapter's product times alpha / rank."""
    published, found = (load_file(path / "model.safetensors") for path in (model, merged))
    assert found.keys() == published.keys()
    for name, weight in published.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            weight = weight + 8 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_the_command_trains_what_swift_trains(workers, megatron_workers, models, tmp_path):
    """The same flags, no adapter to start from. A run goes on cut in another way; files are PEFT's."""
    model, _ = models["qwen3"]
    data = write_rows(tmp_path / "rows.jsonl")
    common = [
        "--model", str(model), "--dataset", str(data), "--add_version", "false", "--train_type", "lora",
        "--lora_rank", "4", "--lora_dropout", "0", "--learning_rate", "2e-3", "--num_train_epochs", "2",
        "--logging_steps", "1", "--save_steps", "4", "--split_dataset_ratio", "0", "--adam_epsilon", "1e-4",
        "--per_device_train_batch_size", "2", "--report_to", "none",
    ]  # fmt: skip
    size = ("--gradient_accumulation_steps", "4", "--weight_decay", "0.1", "--adam_beta2", "0.95")
    plain = ["sft", *common, *size, "--output_dir", str(tmp_path / "plain")]
    assert workers.run(plain).code == 0
    halves = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")
    one, two = tmp_path / "one", tmp_path / "two"
    named = ("--target_modules", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    megatron(megatron_workers, 1, *common, "--global_batch_size", "8", "--output_dir", str(one), *named)
    expected = read_curve(tmp_path / "plain")
    assert near(read_curve(one), expected), (read_curve(one), expected)
    resumed = ["--resume_from_checkpoint", str(one / "checkpoint-4"), "--output_dir", str(two)]
    told = megatron(megatron_workers, 2, *resumed, *halves, "--merge_lora", "true")
    assert "reloaded from disk" in told and "PASS" in told
    assert near(read_curve(two), expected[4:])
    ours, theirs = (load_file(run / "checkpoint-8" / "adapter_model.safetensors")
                    for run in (two, tmp_path / "plain"))  # fmt: skip
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    check_merged(model, ours, two / "checkpoint-8-merged")


def test_dropout_is_drawn_again_as_it_was(models, megatron_workers, tmp_path):
    """Activations that are computed twice are dropped alike, and so are copies on several tensor ranks."""
    plans = {1: [("columns", {}, {})], 2: [("columns", TP, {}), ("qwen3", SP, {}), ("qwen3", SP, UNIFORM)]}
    rows = []
    for world, plan in plans.items():
        cases = [
            case(name, degrees, chosen=chosen, dropout=0.3, model=str(models[name][0]),
                 adapter=str(models[name][1]), result=str(tmp_path / f"{world}-{i}.json"))
            for i, (name, degrees, chosen) in enumerate(plan)
        ]  # fmt: skip
        done = megatron_workers.run(
            [], world, hook=f"{RANKS}:run_cases", hook_arguments={"world": world, "cases": cases}
        )
        assert done.code == 0, done.stderr[-3000:]
        rows += [json.loads(Path(one["result"]).read_text())["rows"] for one in cases]
    alone, cut, kept, again = rows
    assert near(cut, alone)
    assert near(again, kept)


def refused(workers, *argv: str) -> str:
    done = workers.run(["megatron", "sft", *argv])
    assert done.code == 2, done.stderr[-3000:]
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_what_adapters_cannot_be(models, megatron_workers, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    common = ["--model", str(models["some"][0]), "--dataset", str(data), "--output_dir", str(tmp_path)]
    lora = [*common, "--train_type", "lora"]
    experts = [*lora[:1], str(models["shared"][0]), *lora[2:], "--target_modules", "shared_expert_gate"]
    assert refused(megatron_workers, *experts) == (
        "error: --target_modules: megatron has no adapters for model.layers.0.mlp.shared_expert_gate.weight"
    )
    assert refused(megatron_workers, *lora, "--transformer_impl", "transformer_engine") == (
        "error: --transformer_impl transformer_engine does not go with --train_type lora yet"
    )
    assert refused(megatron_workers, *lora, "--save_safetensors", "false") == (
        "error: --save_safetensors false has no effect with --train_type lora: adapters are small files"
    )
    assert refused(megatron_workers, *common, "--merge_lora") == (
        "error: --merge_lora true has no effect with --train_type full"
    )
