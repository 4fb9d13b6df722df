"""megatron-core's layers of torch kernels give transformers' losses and gradients, on every layout."""

from pathlib import Path

import pytest

HOOKS = f"{Path(__file__).parent}/megatron_ranks.py"
TP2 = {"tensor": 2}
SP2 = {"tensor": 2, "sequence": True}
EP2 = {"expert": 2}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
FUSED = {"bias_activation_fusion": True, "bias_dropout_fusion": True}
SELECTIVE = {"recompute_granularity": "selective"}
BALANCE = {"balance": 0.3, "small_logits": 0.01}
DENSE = ("qwen3", "qwen3 tied", "qwen2", "llama bent", "mistral window")


def case(family: str, degrees: dict | None = None, context: str = "all_gather", **chosen: object) -> dict:
    return {"family": family, "degrees": degrees or {}, "chosen": chosen, "context": context}


CASES = {
    "one rank": (
        1,
        [
            *(case(family) for family in (*DENSE, "qwen3_moe", "qwen3_moe mixed", "qwen2_moe", "mixtral")),
            # What GPUs run, but for its compiler.
            *(case(family, **FUSED) for family in ("qwen3", "qwen2_moe")),
            *(case(family) for family in ("deepseek_v2", "deepseek_v2 greedy", "moonlight", "unpaired")),
            case("qwen3_moe", **FUSED, **SELECTIVE, recompute_modules=["moe_act"]),
        ],
    ),
    "tensor": (2, [case("qwen2", TP2), *(case(family, SP2) for family in DENSE)]),
    "expert": (
        2,
        [
            *(case(family, EP2) for family in ("qwen3_moe", "qwen3_moe mixed", "qwen2_moe", "mixtral")),
            case("qwen3_moe", EP2, moe_token_dispatcher_type="allgather"),
            case(
                "mixtral", EP2, moe_expert_capacity_factor=2.0, moe_router_dtype="fp64"
            ),  # nobody is dropped
            case("one sided", EP2),  # the second rank's experts have nothing to do
            case("qwen3_moe", SP2),  # replicated experts
            case("qwen2_moe", SP2 | {"expert_tensor": 2}),
            case("qwen2_moe", SP2 | {"expert": 2}),
            case("qwen3_moe", SP2 | {"expert_tensor": 2}, moe_token_dispatcher_type="allgather"),
            case("qwen2_moe", EP2, moe_shared_expert_overlap=True),
            case("qwen2_moe", SP2 | {"expert": 2}, moe_shared_expert_overlap=True),
        ],
    ),
    "context": (
        2,
        [
            case(family, {"context": 2}, context)
            for family in ("qwen3", "mistral window", "qwen3_moe")
            for context in ("all_gather", "a2a")
        ],
    ),
    "recompute": (
        2,
        [
            case("qwen3", SP2, **FULL, recompute_method="uniform"),
            case("qwen3", {"context": 2}, **FULL, recompute_method="block"),
            case("qwen2_moe", EP2, **FULL, recompute_method="uniform"),
            case("qwen3", SP2, **SELECTIVE, recompute_modules=["core_attn", "layernorm", "mlp"]),
            case("qwen3", {"context": 2}, "a2a", **SELECTIVE, recompute_modules=["core_attn"]),
            case("qwen2_moe", EP2, **SELECTIVE, recompute_modules=["moe_act", "shared_experts", "layernorm"]),
            case("qwen2_moe", SP2 | EP2, **SELECTIVE, recompute_modules=["moe"]),
            case("deepseek_v3", SP2, recompute_latents=True, **SELECTIVE, recompute_modules=["moe"]),
        ],
    ),
    "latent": (
        2,
        [
            case("deepseek_v3", SP2 | EP2),
            case("deepseek_v2", SP2 | {"expert_tensor": 2}, moe_expert_capacity_factor=4.0),
            case("deepseek_v3", {"context": 2}),
            case(
                "deepseek_v2",
                {"context": 2},
                "a2a",
                recompute_latents=True,
                **SELECTIVE,
                recompute_modules=["core_attn"],
            ),
        ],
    ),
    "balance": (
        2,
        [
            *(case("qwen3_moe", degrees, **BALANCE) for degrees in ({"context": 2}, EP2, SP2)),
            case("qwen3_moe mixed", SP2, **BALANCE, **FULL, recompute_method="uniform"),
            case("qwen2_moe", SP2, **BALANCE, **SELECTIVE, recompute_modules=["moe"]),
        ],
    ),
    "expert with tensor": (
        4,
        [
            case("qwen3_moe", SP2 | {"expert": 2}),
            case("qwen3_moe", SP2 | {"expert": 2, "expert_tensor": 2}),
            case("qwen2_moe", SP2 | {"expert": 4}),
        ],
    ),
    "context with tensor": (
        4,
        [case("qwen3", SP2 | {"context": 2}, context) for context in ("all_gather", "a2a")]
        + [case("qwen2", TP2 | {"context": 2}), case("mistral window", {"context": 4})]
        + [case("qwen3_moe", SP2 | {"context": 2, "expert": 2}), case("qwen3", {"context": 2}, "a2a")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_transformers(name, megatron_workers):
    world, cases = CASES[name]
    done = megatron_workers.run(
        [], world, hook=f"{HOOKS}:compare", hook_arguments={"cases": cases, "world": world}
    )
    assert done.code == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("world", "layouts"),
    [(2, (EP2, SP2 | {"expert_tensor": 2}, SP2)), (4, (SP2 | {"expert": 2, "expert_tensor": 2},))],
)
def test_experts_save_what_megatron_core_reads(world, layouts, megatron_workers):
    arguments = {"cases": [case("qwen3_moe", degrees) for degrees in layouts], "world": world}
    done = megatron_workers.run([], world, hook=f"{HOOKS}:compare_checkpoints", hook_arguments=arguments)
    assert done.code == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["check_norms", "check_implementations"])
def test_what_stands_in_for_other_packages(name, megatron_workers, tmp_path):
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("")
    (broken / "pytorch.py").write_text("raise OSError('libcublasLt.so: undefined symbol')")
    done = megatron_workers.run([], hook=f"{HOOKS}:{name}", hook_arguments={"folder": str(tmp_path)})
    assert done.code == 0, done.stderr[-3000:]
