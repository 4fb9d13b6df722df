"""Weights of published models in megatron-core and back: every layout of ranks gives the same bits."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from latent_models import V2, V3
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

WIDE = {"num_hidden_layers": 4, "vocab_size": 515}  # does not divide by two: ranks have padding
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 48}),
    "mixed": ("qwen3_moe", EXPERTS | {"mlp_only_layers": [1]}),
    "deepseek_v2": ("deepseek_v2", V2),
    "deepseek_v3": ("deepseek_v3", V3),
    "mixtral": ("mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
}
TENSOR, PIPELINE, EXPERT, EXPERT_TENSOR = (
    {name: 2} for name in ("tensor", "pipeline", "expert", "expert_tensor")
)
SEQUENCE = TENSOR | {"sequence": True}
VIRTUAL = PIPELINE | {"virtual": 2}
LAYOUTS = {  # of so many processes, and which models go through each
    1: (({}, tuple(MODELS)),),
    2: (
        (TENSOR, ("qwen2", "qwen3", "mixtral")),
        (PIPELINE, ("qwen3", "mixed")),
        (VIRTUAL, ("llama", "qwen3")),
        (EXPERT, ("mixed", "mixtral")),
        (TENSOR | EXPERT_TENSOR, ("mixed", "qwen2_moe")),
        (SEQUENCE, ("deepseek_v2", "deepseek_v3")),
    ),
    4: (
        (TENSOR | PIPELINE, ("qwen3",)),
        (EXPERT | VIRTUAL, ("mixed",)),
        (EXPERT | PIPELINE, ("deepseek_v3",)),
        (TENSOR | EXPERT | EXPERT_TENSOR, ("mixed", "mixtral")),
    ),
}
ROUNDED = "qwen2"  # goes through everything in bfloat16, others as they are
SAVED = ("qwen3", "mixed", "deepseek_v3")  # also go through checkpoints
FILES = {".metadata", "common.pt", "metadata.json"}


def round_trips(rank: int, world: int, models: dict[str, str], folder: str) -> None:
    """Inside every process: models through layouts, and into all others through checkpoints."""
    for number, (layout, names) in enumerate(LAYOUTS[world]):
        with model_parallel(world, layout) as degrees:
            for name in names:
                source, checkpoints = Path(models[name]), Path(folder) / name
                dtype = torch.bfloat16 if name == ROUNDED else torch.float32
                weights = load_file(source / "model.safetensors")
                expected = {key: value.to(dtype) for key, value in weights.items()}
                chunks, bridge = build(source, degrees, dtype)
                spoil(chunks)
                bridge.load(chunks, source)
                check_weights(rank, chunks, bridge, expected)
                check_checkpoints(rank, chunks, bridge, checkpoints, expected)
                if name in SAVED and number < 2:
                    dist_checkpoint().save_model(chunks, checkpoints / f"{world}-{number}")


def check_checkpoints(rank, chunks, bridge, folder: Path, expected) -> None:
    for checkpoint in sorted(folder.glob("*")):
        spoil(chunks)
        dist_checkpoint().load_model(chunks, checkpoint / "iter_0000001")
        check_weights(rank, chunks, bridge, expected)
        assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "1"
        names = {path.name for path in (checkpoint / "iter_0000001").iterdir()}
        assert {name for name in names if not name.endswith(".distcp")} == FILES


def check_weights(rank, chunks, bridge, expected) -> None:
    check_padding(chunks, bridge)
    seen = dict(bridge.export(chunks))
    assert list(seen) == list(bridge.wholes(chunks))
    assert seen.keys() == expected.keys(), seen.keys() ^ expected.keys()
    for key, tensor in seen.items():
        if rank == 0:
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key]), key
        else:
            assert tensor is None


def dist_checkpoint():
    from swift.engines.megatron import dist_checkpoint

    return dist_checkpoint


@contextmanager
def model_parallel(world: int, layout: dict[str, int]):
    from swift.config.layout import Layout
    from swift.engines.megatron.setup import join_model_parallel, leave_model_parallel, seed_model_parallel
    from swift.engines.ranks import join_ranks

    ranks, _ = join_ranks(torch.device("cpu"), 120)
    assert ranks.world == world
    degrees = Layout(**layout)
    join_model_parallel(ranks, degrees, 120)
    seed_model_parallel(1)
    yield degrees
    leave_model_parallel()


def build(directory: Path, degrees, dtype: torch.dtype):
    """Chunks without weights, and the bridge to fill them."""
    from swift.engines.megatron import bridge, model, settings

    config = AutoConfig.from_pretrained(directory)
    fields = settings.model_settings(config, degrees, dtype)
    return model.build_chunks(config, fields), bridge.Bridge(config, fields)


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


@pytest.fixture(scope="module")
def models(make_tiny_model_dir, tmp_path_factory) -> dict[str, str]:
    return {
        name: str(make_tiny_model_dir(tmp_path_factory.mktemp(name), family, **WIDE | fields))
        for name, (family, fields) in MODELS.items()
    }


def test_weights_go_in_and_out_bit_by_bit(megatron_workers, models, tmp_path):
    """A checkpoint of one number of processes is read by others."""
    for world in LAYOUTS:
        arguments = {"world": world, "models": models, "folder": str(tmp_path)}
        result = megatron_workers.run([], world, hook=f"{__file__}:round_trips", hook_arguments=arguments)
        assert result.code == 0, result.stderr[-5000:]


BLOCK = (24, 20)  # which no share of a weight is made of


def read_blocks(rank: int, world: int, source: str, expected: str) -> None:
    """Inside every process: 8-bit floats as numbers, whose blocks the cuts go through."""
    with model_parallel(world, SEQUENCE | EXPERT) as degrees:
        chunks, bridge = build(Path(source), degrees, torch.float32)
        spoil(chunks)
        bridge.load(chunks, Path(source))
        check_weights(rank, chunks, bridge, load_file(expected))


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """8-bit floats, a scale for each block, and the numbers that these mean."""
    small, numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty([-(-length // size) for length, size in zip(weight.shape, BLOCK, strict=True)])
    for i, rows in enumerate(weight.split(BLOCK[0], 0)):
        for j, block in enumerate(rows.split(BLOCK[1], 1)):
            place = tuple(slice(n * size, (n + 1) * size) for n, size in zip((i, j), BLOCK, strict=True))
            scales[i, j] = block.abs().max() / 448
            small[place] = (block / scales[i, j]).to(small.dtype)
            numbers[place] = small[place].float() * scales[i, j]
    return small, scales, numbers


def test_8_bit_floats_in_blocks_become_plain_weights(megatron_workers, models, tmp_path):
    source = shutil.copytree(models["deepseek_v3"], tmp_path / "fp8")
    told = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    config = json.loads((source / "config.json").read_text())
    written, expected = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        written[name] = expected[name] = weight
        if name.endswith("_proj.weight") or "kv_a_proj" in name:
            written[name], written[f"{name}_scale_inv"], expected[name] = quantise(weight)
    written["model.layers.4.eh_proj.weight"] = torch.ones(64, 128)
    save_file(written, source / "model.safetensors", {"format": "pt"})
    save_file(expected, tmp_path / "expected.safetensors")
    arguments = {"world": 2, "source": str(source), "expected": str(tmp_path / "expected.safetensors")}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    done = megatron_workers.run([], 2, hook=f"{__file__}:read_blocks", hook_arguments=arguments)
    assert done.code == 0, done.stderr[-3000:]
    assert (
        "warning: 1 tensors of layers that predict further tokens (MTP, model.layers.4) are left out"
        in done.stderr
    )
