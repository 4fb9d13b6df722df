"""Weights of published models in megatron-core and back: every layout of ranks gives the same bits."""

from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

WIDE = {"num_hidden_layers": 4, "vocab_size": 515}  # does not divide by two: ranks have padding
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mixtral": ("mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
}
SINGLE, TENSOR, PIPELINE = {}, {"tensor": 2}, {"pipeline": 2}
VIRTUAL, EXPERT = {"pipeline": 2, "virtual": 2}, {"expert": 2}
EXPERT_LAYOUT = {"expert", "expert_tensor"}
LAYOUTS = {
    1: (SINGLE,),
    2: (TENSOR, PIPELINE, VIRTUAL, EXPERT, TENSOR | {"expert_tensor": 2}, SINGLE),
    4: (
        TENSOR | PIPELINE,
        TENSOR | VIRTUAL,
        EXPERT | PIPELINE,
        TENSOR | EXPERT | {"expert_tensor": 2},
        TENSOR | EXPERT,
    ),
}


def round_trips(rank: int, world: int, models: dict[str, str]) -> None:
    """Inside every process: each model through each layout, bit by bit."""
    expected = {name: load_file(Path(models[name]) / "model.safetensors") for name in models}
    for layout in LAYOUTS[world]:
        with model_parallel(world, layout) as degrees:
            for name, dtype in product(models, (torch.float32, torch.bfloat16)):
                if "experts" in str(MODELS[name]) or not layout.keys() & EXPERT_LAYOUT:
                    check_round_trip(rank, Path(models[name]), degrees, dtype, expected[name])


def check_round_trip(rank, directory, degrees, dtype, expected) -> None:
    chunks, bridge = build(directory, degrees, dtype)
    spoil(chunks)
    bridge.load(chunks, directory)
    check_padding(chunks, bridge)
    seen = dict(bridge.export(chunks))
    assert list(seen) == list(bridge.wholes(chunks))
    assert seen.keys() == expected.keys(), seen.keys() ^ expected.keys()
    for key, tensor in seen.items():
        if rank == 0:
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[key].to(dtype)), (directory, degrees, key)
        else:
            assert tensor is None


@contextmanager
def model_parallel(world: int, layout: dict[str, int]):
    from swift.engines.megatron.settings import Degrees
    from swift.engines.megatron.setup import join_model_parallel, leave_model_parallel, seed_model_parallel
    from swift.engines.ranks import join_ranks

    ranks, _ = join_ranks(torch.device("cpu"), 120)
    assert ranks.world == world
    degrees = Degrees(**layout)
    join_model_parallel(ranks, degrees, 120)
    seed_model_parallel(1)
    yield degrees
    leave_model_parallel()


def build(directory: Path, degrees, dtype: torch.dtype):
    """Chunks without weights, and the bridge to fill them."""
    from swift.engines.megatron import bridge, model, settings

    config = AutoConfig.from_pretrained(directory)
    fields = settings.model_settings(config, degrees, dtype)
    if fields.num_moe_experts:
        use_local_spec(model)
    chunks = [chunk.to(dtype) for chunk in model.build_chunks(config, fields)]
    return chunks, bridge.Bridge(config, fields)


def spoil(chunks) -> None:
    """Parameters are made without values; here none of them may be right by chance."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)


def check_padding(chunks, bridge) -> None:
    """Rows that files do not have are zero on the rank that holds them."""
    from megatron.core import parallel_state

    for chunk in chunks:
        for key, parameter in chunk.named_parameters():
            if "embedding" in key or "output_layer" in key:
                first = parallel_state.get_tensor_model_parallel_rank() * parameter.shape[0]
                padding = parameter[max(bridge.vocabulary - first, 0) :]
                assert not padding.any(), key
                assert parameter.any(), key


def use_local_spec(model) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model.layer_spec = lambda settings: get_gpt_layer_local_spec(
        num_experts=settings.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=settings.qk_layernorm
    )


@pytest.fixture(scope="module")
def models(make_tiny_model_dir, tmp_path_factory) -> dict[str, str]:
    return {
        name: str(make_tiny_model_dir(tmp_path_factory.mktemp(name), family, **WIDE | fields))
        for name, (family, fields) in MODELS.items()
    }


@pytest.mark.parametrize("world", LAYOUTS)
def test_weights_go_in_and_out_bit_by_bit(megatron_workers, models, world):
    arguments = {"world": world, "models": models}
    result = megatron_workers.run([], world, hook=f"{__file__}:round_trips", hook_arguments=arguments)
    assert result.code == 0, result.stderr[-5000:]
