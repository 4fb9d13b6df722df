"""One step, any layout: losses, gradients of every parameter, and answers, against one process.

Each world of processes is one job that goes through all its cases, so that starting costs once.
"""

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_layouts import make_rows
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from swift.batch import Batch
from swift.config.optim import OptimConfig
from swift.config.parallel import ParallelConfig
from swift.data.collate import collate
from swift.engines.ranks import join_ranks
from swift.engines.transformers.engine import TransformersEngine
from swift.engines.transformers.wrap import load_zero, wrap
from swift.models.load import load_tokenizer
from swift.objectives.distill import Distill
from swift.objectives.policy import Policy, PolicyRule
from swift.objectives.sft import Sft
from swift.rollout.local import LocalRollout
from swift.rollout.types import Request, Sampling

POLICY = Policy(PolicyRule(beta=0.1, log_entropy=True, has_rollout_logps=True,
                           rollout_importance_sampling_mode="token_truncate"))  # fmt: skip
# Rows of each step. The last are uneven, and leave ranks without a trained token (row 4) or a row.
STEPS = ((0, 1, 2, 3, 4, 5, 6, 7), (4, 1, 2, 5, 3), (4, 1))
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MODELS = {
    "llama-lora": ("llama", {}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ALL, PAIRED = tuple(MODELS), ("llama-one-kv-head", "qwen3-moe")
# By world: layout -> models. Together they see every layout, and every model every kind of layout.
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"single": ALL},
    2: {
        "ddp": ALL, "fsdp": ALL, "ddp-sp2": PAIRED, "fsdp-sp2-recompute": ("llama-lora", "qwen3"),
        "zero1": ("llama-lora", "qwen3-moe"), "zero2": ("llama-lora", "qwen3-moe"),
        "zero3": ("llama-lora", "qwen3-moe"), "zero2_offload": ("qwen3-moe",), "zero2-sp2": ("llama-lora",),
    },
    4: {"ddp": ("qwen3-moe",), "ddp-sp2": PAIRED, "fsdp-sp2": ("llama-one-kv-head",), "ddp-sp4": PAIRED},
}  # fmt: skip


def cases_of(world: int) -> list[tuple[str, str]]:
    """(layout, model) of a job."""
    return [(layout, model) for layout, models in LAYOUTS[world].items() for model in models]


def run_cases(rank: int, world: int, models: dict[str, str], folder: str) -> None:
    """In every process of a job: all cases; numbers and gradients go into files."""
    ranks: dict[int, object] = {}
    for layout, model in cases_of(world):
        kind, *extras = layout.split("-")
        if kind.startswith("zero") and not HAS_DEEPSPEED:
            continue
        size = next((int(e[2:]) for e in extras if e.startswith("sp")), 1)
        if size not in ranks:
            ranks[size], _ = join_ranks(torch.device("cpu"), 120, sequence_size=size)
        lora, recompute = model.endswith("lora"), "recompute" in extras
        taught_by = models["llama-one-kv-head"] if model == "qwen3" else None
        engine = build_engine(
            models[model], kind, ranks[size], lora=lora, recompute=recompute, taught_by=taught_by
        )
        check_weights(engine, load_file(f"{folder}/{model}/model.safetensors"))
        record(engine, models[model], Path(folder) / f"{world}-{layout}-{model}")


def load_for_training(directory: str, *, lora: bool):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if not lora:
        return model
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def save_merged(directory: str, folder: Path, *, lora: bool) -> None:
    """What transformers writes of the model that is trained, adapters folded in by PEFT."""
    model = load_for_training(directory, lora=lora)
    (model.merge_and_unload() if lora else model).save_pretrained(folder)


def check_weights(engine: TransformersEngine, expected: dict[str, torch.Tensor]) -> None:
    """What every rank of every layout hands to another engine, one after the other: the same bits."""
    left = dict(expected)
    for name, tensor in engine.weights():
        assert torch.equal(tensor, left.pop(name)), name
    assert left == {}


def build_engine(
    directory: str, kind: str, ranks, *, lora: bool, recompute: bool, taught_by: str | None
) -> TransformersEngine:
    model = load_for_training(directory, lora=lora)
    teacher = load_for_training(taught_by, lora=False) if taught_by else None
    wrapper = partial(wrap, parallel=ParallelConfig(fsdp="fsdp2" if kind == "fsdp" else None))
    if kind.startswith("zero"):
        zero = load_zero()
        # Small weights stay whole in stage 3 unless told otherwise, and all of these are small.
        text = kind
        if kind.startswith("zero3"):
            config = zero.preset(kind)
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            text = json.dumps(config)
        config = zero.settle(
            text, micro_batch=1, accumulation=1, data_world=1, clip=1e-3, compute="float32", width=64
        )
        wrapper = partial(zero.wrap_zero, config=config)
    # A rate of zero keeps the weights where they are: every step is compared at the same point.
    return TransformersEngine(
        model, OptimConfig(max_grad_norm=1e-3), learning_rate=0.0, total_steps=10, ranks=ranks,
        wrapper=wrapper, gradient_checkpointing=recompute, frozen=teacher,
    )  # fmt: skip


def make_online_batches(engine: TransformersEngine, chosen: tuple[int, ...]) -> list[Batch]:
    """This rank's answers with advantages, in micro-batches of two; the old policy is near the new one."""
    rows, mine = make_rows(), chosen[engine.data_rank :: engine.data_world]
    batches = [collate([rows[i] for i in mine[j : j + 2]]) for j in range(0, len(mine), 2)]
    for number, (batch, stats) in enumerate(
        zip(batches, engine.forward(batches, frozenset({"logps"})), strict=True)
    ):
        numbers_T = torch.tensor(mine[2 * number : 2 * number + 2])[batch.segment_ids]
        noise_T = 0.4 * torch.sin(7.0 * batch.input_ids + numbers_T) * batch.trained
        batch.token["advantages"] = torch.cos(numbers_T + 1.0)
        for name, share in (("old_logps", 1.0), ("ref_logps", -0.5), ("rollout_logps", 0.7)):
            batch.token[name] = stats.logps.cpu() + share * noise_T
    return batches


def record_online(engine: TransformersEngine) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
    """Means and gradients of a step of a policy, and of one with a teacher where the engine has one."""
    means, gradients = {}, {}
    for objective in (POLICY, *((Distill(),) if engine.frozen else ())):
        name = type(objective).__name__
        means[name] = engine.forward_backward(make_online_batches(engine, STEPS[1]), objective).means()
        found = {f"{name} {n}": read_gradient(p) for n, p in engine.model.named_parameters()}
        gradients |= {key: gradient.clone() for key, gradient in found.items() if gradient is not None}
        engine.optim_step()
    return means, gradients


def answer(engine: TransformersEngine, directory: str) -> list[list[float]]:
    """Tokens and log-probabilities of three requests, one for a data rank in turn; a fourth has none."""
    rollout = LocalRollout(engine, load_tokenizer(Path(directory)), stop_token_ids=[], context=64, max_rows=4)
    mine = range(engine.data_rank, 3, engine.data_world)
    requests = [Request([9 + number, 30, 41], Sampling(4 + number), count=2) for number in mine]
    found = {
        number: [x for a in answers for x in (*a.token_ids, *a.logps)]
        for number, answers in zip(mine, rollout.generate(requests), strict=True)
    }
    everybody = {number: row for part in engine.ranks.collect(found) for number, row in part.items()}
    return [everybody[number] for number in range(3)]


def record(engine: TransformersEngine, directory: str, path: Path) -> None:
    rows, numbers, gradients, answers = make_rows(), [], {}, []
    for step, chosen in enumerate(STEPS):
        if step != 1:  # before anything has run, and between two steps
            answers.append(answer(engine, directory))
        mine = chosen[engine.data_rank :: engine.data_world]
        batches = [collate([rows[i] for i in mine[j : j + 2]]) for j in range(0, len(mine), 2)]
        sums = engine.forward_backward(batches, Sft())
        for name, parameter in engine.model.named_parameters():
            gradient = read_gradient(parameter)
            if gradient is not None:
                gradients[f"{step} {name}"] = gradient.clone()
        info = engine.optim_step()
        numbers.append([*sums.pairs["loss/tokens"], *sums.pairs["token_acc"], info.grad_norm])
        numbers[-1] += engine.measure(batches, Sft()).pairs["loss/tokens"]
    means, found = record_online(engine)
    gradients |= found
    if engine.ranks.is_main:
        save_file(gradients, f"{path}.safetensors")
        path.with_name(path.name + ".json").write_text(json.dumps([numbers, answers, means]))


def read_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    if not parameter.requires_grad:
        return None
    if HAS_DEEPSPEED:
        from deepspeed.utils import safe_get_full_grad

        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            return safe_get_full_grad(parameter).cpu()
    if isinstance(parameter.grad, DTensor):
        return parameter.grad.full_tensor()
    return parameter.grad


@pytest.fixture(scope="module")
def recorded(workers, make_tiny_model_dir, tmp_path_factory):
    """Numbers and gradients of every case, from three jobs."""
    folder = tmp_path_factory.mktemp("recorded")
    models = {
        name: str(make_tiny_model_dir(tmp_path_factory.mktemp(name), family, **fields))
        for name, (family, fields) in MODELS.items()
    }
    for name, directory in models.items():
        save_merged(directory, folder / name, lora=name.endswith("lora"))
    for world in LAYOUTS:
        arguments = {"world": world, "models": models, "folder": str(folder)}
        result = workers.run([], world, hook=f"{__file__}:run_cases", hook_arguments=arguments)
        assert result.code == 0, result.stderr[-5000:]

    def read(case: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """[numbers, answers, means] and gradients."""
        return json.loads((folder / f"{case}.json").read_text()), load_file(folder / f"{case}.safetensors")

    return read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layout", "model"), [(world, *case) for world in (2, 4) for case in cases_of(world)]
)
def test_a_layout_gives_what_one_process_gives(recorded, world, layout, model):
    if layout.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    (numbers, answers, means), gradients = recorded(f"{world}-{layout}-{model}")
    (expected_numbers, expected_answers, expected_means), expected_gradients = recorded(f"1-single-{model}")
    for ours, theirs in zip(answers, expected_answers, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for key, expected in expected_gradients.items():
        # Advantages of both signs cancel, and what is left has lost a digit.
        tolerance = 1e-5 if key.startswith("Policy") else 1e-6
        assert (gradients[key] - expected).norm() <= tolerance * expected.norm(), key
    assert means.keys() == expected_means.keys() and 0 < means["Policy"]["clip_ratio/region_mean"] < 1
    for name, found in means.items():
        assert found == pytest.approx(expected_means[name], rel=1e-5, abs=1e-6), name
    residuals = []
    for step, (ours, theirs) in enumerate(zip(numbers, expected_numbers, strict=True)):
        # torch's float32 norm on the CPU is off by 1e-6 where experts are fused; DeepSpeed adds in float64.
        mine = [g.double() for key, g in expected_gradients.items() if key.startswith(f"{step} ")]
        norm = sum(float(g.square().sum()) for g in mine) ** 0.5
        assert ours.pop(4) == pytest.approx(norm, rel=2e-6) and theirs.pop(4) == pytest.approx(norm, rel=2e-6)
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert ours[1:4] == theirs[1:4]  # counts are counts
        residuals.append((ours[0] - theirs[0]) / theirs[0])
    assert abs(sum(residuals)) / len(residuals) < 5e-7
