"""The Megatron engine takes the steps of the transformers engine, whatever layout the model is cut into."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_models import V2, V3
from safetensors.torch import load_file
from steps import OPTIM, RATE, STATS, TEMPERATURE, UNSEEN, make_batches, make_objective, take_online_steps
from transformers import AutoModelForCausalLM

from swift.engines.transformers.engine import TransformersEngine

HOOK = f"{Path(__file__).parent}/megatron_steps.py:run_cases"
MODELS = {
    "qwen3": ("qwen3", {"vocab_size": 515}),
    "tied": ("qwen3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "moe": ("qwen3_moe", {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
                          "moe_intermediate_size": 32}),
    "latent": ("deepseek_v3", V3 | {"num_hidden_layers": 4}),
    "latent2": ("deepseek_v2", V2 | {"num_hidden_layers": 4}),
}  # fmt: skip
TP, PP, CP, EP = ({name: 2} for name in ("tensor", "pipeline", "context", "expert"))
SP = TP | {"sequence": True}
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def case(name: str, degrees: dict | None = None, *, sliced: bool = True, **more: Any) -> dict[str, Any]:
    chosen = more.pop("chosen", {})
    chosen |= {"moe_router_bias_update_rate": 0.0}  # which only Megatron moves
    return {"name": name, "degrees": degrees or {}, "chosen": chosen, "sliced": sliced, "overlap": False,
            "context": "all_gather"} | more  # fmt: skip


LAYOUTS = {
    1: [case("qwen3"), case("moe", sliced=False)],
    2: [
        case("qwen3", TP),
        case("tied", SP, sliced=False),
        case("llama", PP, sliced=False),
        case("tied", PP | {"virtual": 2}, sliced=False),
        case("qwen3", CP, sliced=False),
        case("llama", CP, context="a2a"),
        case("qwen3", sliced=True, overlap=True),
        case("llama", sliced=False),
        case("moe", EP, sliced=False),
        case("moe", SP | {"expert_tensor": 2}),
        case("qwen3", SP, chosen=UNIFORM),
    ],
    4: [
        case("tied", TP | PP),
        case("qwen3", SP | CP, sliced=False),
        case("moe", SP | EP, sliced=False),
        case("moe", EP | PP),
        case("latent", EP | PP, sliced=False),
    ],
}

LATENTS = {
    2: [
        *(case(name, layout, sliced=False) for name in ("latent", "latent2") for layout in (SP, PP, EP)),
        case("latent", CP, sliced=False),
        case("latent2", CP, context="a2a", sliced=False),
        case("latent", PP | {"virtual": 2}),
        case("latent2", EP, chosen={"recompute_latents": True}),
    ],
    4: [
        *(case(name, SP | EP, sliced=False) for name in ("latent", "latent2")),
        case("latent", SP | PP),
        case("latent", EP | CP),
    ],
}


@pytest.fixture(scope="module")
def models(make_tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """Directories of the models, each parameter random."""
    made = {}
    for name, (family, fields) in MODELS.items():
        path = make_tiny_model_dir(tmp_path_factory.mktemp(name), family, **fields)
        model = AutoModelForCausalLM.from_pretrained(path)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(path)
        made[name] = path
    return made


def train(path: Path, steps: int) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = TransformersEngine(model, OPTIM, learning_rate=RATE, total_steps=steps, temperature=TEMPERATURE)
    rows, gradients = [], {}
    for step in range(steps):
        sums = engine.forward_backward(make_batches(step), make_objective())
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        rows.append([sums.means()["loss/tokens"], engine.optim_step().grad_norm])
    stats = engine.forward(make_batches(UNSEEN)[:1], frozenset(STATS))[0]
    return {
        "rows": rows,
        "gradients": gradients,
        "parameters": list(engine.num_parameters),
        "eval": engine.measure(make_batches(UNSEEN), make_objective()).means()["loss/tokens"],
        "stats": {name: getattr(stats, name).double().sum().item() for name in STATS},
        "online": take_online_steps(engine),
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_takes_the_same_steps(world, models, megatron_workers, tmp_path):
    compare(world, 3, LAYOUTS[world], models, megatron_workers, tmp_path)


@pytest.mark.slow_suite
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_takes_many_steps(world, models, megatron_workers, tmp_path):
    compare(world, 20, LAYOUTS[world], models, megatron_workers, tmp_path)


@pytest.mark.slow_suite
@pytest.mark.parametrize("world", LATENTS)
def test_latent_attention_on_every_layout(world, models, megatron_workers, tmp_path):
    compare(world, 8, LATENTS[world], models, megatron_workers, tmp_path)


def compare(
    world: int,
    steps: int,
    layouts: list[dict[str, Any]],
    models: dict[str, Path],
    megatron_workers: Any,
    tmp_path: Path,
) -> None:
    """Every layout of so many processes against the transformers engine on one."""
    expected = {name: train(models[name], steps) for name in {one["name"] for one in layouts}}
    cases = [
        one | {"steps": steps, "model": str(models[one["name"]]), "result": str(tmp_path / f"{i}.json")}
        for i, one in enumerate(layouts)
    ]
    done = megatron_workers.run([], world, hook=HOOK, hook_arguments={"world": world, "cases": cases})
    assert done.code == 0, done.stderr[-3000:]
    for one in cases:
        found, reference = json.loads(Path(one["result"]).read_text()), expected[one["name"]]
        about = f"{one['name']} on {one['degrees']}"
        for step, (mine, theirs) in enumerate(zip(found["rows"], reference["rows"], strict=True)):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-5), f"{about}: loss of step {step}"
            assert mine[1] == pytest.approx(theirs[1], rel=1e-4), f"{about}: gradient norm of step {step}"
        assert found["eval"] == pytest.approx(reference["eval"], rel=1e-5), about
        assert found["stats"] == pytest.approx(reference["stats"], rel=1e-4), about
        for mine, theirs in zip(found["online"], reference["online"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6), about
        if not one["sliced"]:
            compare_gradients(Path(one["result"]).with_suffix(".safetensors"), reference["gradients"], about)


def compare_gradients(path: Path, expected: dict[str, torch.Tensor], about: str) -> None:
    """Parameter by parameter, under the names of files: transformers stacks experts, files do not."""
    gradients = load_file(path)
    for name, theirs in expected.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for expert, stacked in enumerate(theirs):
                prefix = f"{name.rpartition('.')[0]}.{expert}"
                kinds = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
                for kind, part in zip(kinds, stacked.chunk(len(kinds)), strict=True):
                    check(gradients.pop(f"{prefix}.{kind}.weight"), part, f"{about}: {prefix}.{kind}")
        else:
            check(gradients.pop(name), theirs, f"{about}: {name}")
    assert not gradients, f"{about}: {sorted(gradients)}"


def check(mine: torch.Tensor, theirs: torch.Tensor, about: str) -> None:
    error = (mine - theirs).abs().max().item()
    assert error <= 1e-5 * max(theirs.abs().max().item(), 1e-2), f"{about}: {error}"
