"""Heads learn on the Megatron engine what they learn on the transformers engine, in any layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from head_steps import OPTIM, RATE, STEPS, TASKS, make_batches
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from swift.engines.transformers.engine import TransformersEngine

HOOK = f"{Path(__file__).parent}/megatron_head_steps.py:run_cases"
MODELS = {
    "tied": ("llama", {}),
    "apart": ("qwen3", {"vocab_size": 515, "tie_word_embeddings": False}),
}
TP, PP, CP, DP = {"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}
SP = TP | {"sequence": True}


def case(task: str, name: str, degrees: dict[str, Any], *, overlap: bool = False) -> dict[str, Any]:
    return {"task": task, "name": name, "degrees": degrees, "overlap": overlap}


CASES = [
    case("rm", "apart", TP),
    case("rm", "tied", PP),
    case("rm", "apart", DP, overlap=True),
    case("classes", "tied", SP),
    case("classes", "apart", CP),
    case("embedding", "apart", SP),
    case("embedding", "tied", PP, overlap=True),
    case("judged", "apart", SP),
    case("values", "tied", CP),
]


@pytest.fixture(scope="module")
def models(make_tiny_model_dir, tmp_path_factory) -> dict[tuple[str, int], Path]:
    """Directories by name and outputs of the head, each parameter random."""
    made = {}
    for name, head in {(one["name"], TASKS[one["task"]].head) for one in CASES}:
        family, fields = MODELS[name]
        path = make_tiny_model_dir(tmp_path_factory.mktemp(f"{name}-{head}"), family, **fields)
        kind = AutoModelForSequenceClassification if head else AutoModelForCausalLM
        model = kind.from_pretrained(path, **({"num_labels": head} if head else {}))
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(path)
        made[name, head] = path
    return made


def train(path: Path, task: str) -> dict[str, Any]:
    chosen = TASKS[task]
    kind = AutoModelForSequenceClassification if chosen.head else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=torch.float32)
    engine = TransformersEngine(model, OPTIM, learning_rate=RATE, total_steps=STEPS, verdict=chosen.verdict)
    rows = []
    for step in range(STEPS):
        sums = engine.forward_backward(make_batches(step, engine), chosen.objective)
        rows.append([sums.means()[f"loss/{chosen.unit}"], engine.optim_step().grad_norm])
    stats = engine.forward(make_batches(STEPS, engine)[:1], chosen.objective.needs)[0]
    return {
        "rows": rows,
        "eval": engine.measure(make_batches(STEPS, engine), chosen.objective).means()[f"loss/{chosen.unit}"],
        "stats": [getattr(stats, name).double().sum().item() for name in sorted(chosen.objective.needs)],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


@pytest.mark.slow
def test_heads_learn_alike(models, megatron_workers, tmp_path):
    cases = [
        one
        | {"model": str(models[one["name"], TASKS[one["task"]].head]), "result": str(tmp_path / f"{i}.json")}
        for i, one in enumerate(CASES)
    ]
    done = megatron_workers.run([], 2, hook=HOOK, hook_arguments={"world": 2, "cases": cases})
    assert done.code == 0, done.stderr[-3000:]
    expected = {(c["task"], c["name"]): train(Path(c["model"]), c["task"]) for c in cases}
    for one in cases:
        about, theirs = (
            f"{one['task']} of {one['name']} on {one['degrees']}",
            expected[one["task"], one["name"]],
        )
        found = json.loads(Path(one["result"]).read_text())
        for mine, other in zip(found["rows"], theirs["rows"], strict=True):
            assert mine == pytest.approx(other, rel=1e-5), about
        assert found["eval"] == pytest.approx(theirs["eval"], rel=1e-5), about
        if one["degrees"]:  # the rows of the first data rank are others
            assert found["stats"] == pytest.approx(theirs["stats"], rel=1e-4, abs=1e-5), about
        weights = load_file(Path(one["result"]).with_suffix(".safetensors"))
        left = theirs["weights"].keys() - weights.keys()
        assert left <= {"lm_head.weight"}, about
        for name, mine in weights.items():
            assert (mine - theirs["weights"][name]).abs().max() <= 1e-5, f"{about}: {name}"
