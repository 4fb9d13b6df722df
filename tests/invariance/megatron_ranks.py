"""Runs in every rank of a job: megatron-core's layers against transformers' model of the same weights.

`slices` says which part of each tensor of transformers a rank holds. It serves weights and gradients, and is
written apart from the engine's own bridge, so that neither can hide a mistake of the other.
"""

import inspect
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from latent_models import MOONLIGHT, V2, V3, YARN
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import apply_factories, apply_factory_merges
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import clip_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from swift.batch import IGNORED, Batch
from swift.config.layout import Layout
from swift.config.megatron import MegatronConfig
from swift.config.option import ConfigError
from swift.engines.megatron import implementation, speed, wgrad
from swift.engines.megatron.bridge import block_of
from swift.engines.megatron.context import ContextRanks
from swift.engines.megatron.layers import flat_tokens
from swift.engines.megatron.model import build_chunks
from swift.engines.megatron.settings import Settings, chosen_settings, model_settings
from swift.engines.megatron.setup import join_model_parallel, leave_model_parallel, seed_model_parallel
from swift.engines.ranks import Ranks
from swift.objectives.router import segment_balance
from swift.objectives.sft import has_trained

COMMON = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
BIAS = "e_score_correction_bias"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "llama bent": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "mistral window": ("mistral", {"sliding_window": 7}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe mixed": ("qwen3_moe", EXPERTS | {"num_hidden_layers": 4, "decoder_sparse_step": 2,
                                                "mlp_only_layers": [3]}),
    "one sided": ("qwen3_moe", EXPERTS | {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 48}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "deepseek_v2": ("deepseek_v2", V2),
    "deepseek_v2 greedy": ("deepseek_v2", V2 | {"topk_method": "greedy", "rope_parameters": YARN}),
    "deepseek_v3": ("deepseek_v3", V3 | {"num_hidden_layers": 3}),
    "moonlight": ("deepseek_v3", MOONLIGHT),
    "unpaired": ("deepseek_v3", V3 | {"rope_interleave": False, "norm_topk_prob": False}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model on one layout."""

    family: str
    degrees: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    context: str = "all_gather"
    lengths: tuple[int, ...] = (5, 17, 9, 31, 3)


def build_model(family: str) -> PreTrainedModel:
    """transformers' model, every parameter of it random."""
    kind, fields = FAMILIES[family]
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **COMMON | fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(BIAS):
                buffer.add_(torch.randn_like(buffer) * 0.1)
        if family == "one sided":  # one of the first two experts always wins, the others never see a token
            for layer in model.model.layers:
                layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
                layer.mlp.gate.weight[2:] = 0
    return model.eval()


def make_batches(case: Case, data_rank: int) -> list[Batch]:
    """Two micro-batches of a data rank."""
    return [make_batch(lengths, 2 * data_rank + i) for i, lengths in enumerate((case.lengths, (9, 40, 2, 6)))]


def make_batch(lengths: tuple[int, ...], seed: int) -> Batch:
    """Rows of random tokens; a third of them, and all of the last segment, are not trained."""
    generator = torch.Generator().manual_seed(11 + seed)
    total = sum(lengths)
    ids = torch.randint(0, 256, (total,), generator=generator)
    labels = torch.randint(0, 256, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.3] = IGNORED
    labels[-lengths[-1] :] = IGNORED
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Batch(ids, labels, segments, len(lengths))


def expect(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[T] loss of each token, segment by segment."""
    logits = []
    for ids in batch.input_ids.split(batch.segment_lengths().tolist()):
        logits.append(model(input_ids=ids[None], use_cache=False).logits[0].float())
    labels = batch.labels
    return torch.nn.functional.cross_entropy(
        torch.cat(logits), labels, ignore_index=IGNORED, reduction="none"
    )


def expect_routing(model: PreTrainedModel, batch: Batch, settings: Settings) -> Tensor:
    """What routers' losses add: sums over the tokens of segments that train."""
    logits = []
    for ids in batch.input_ids.split(batch.segment_lengths().tolist()):
        output = model(input_ids=ids[None], use_cache=False, output_router_logits=True)
        logits.append(torch.stack(output.router_logits))
    layers = torch.cat(logits, 1)  # [layers, T, E]
    tokens_S = batch.segment_lengths() * has_trained(batch)
    balance = [
        segment_balance([layer], batch, settings.moe_router_topk) @ tokens_S.float() for layer in layers
    ]
    size = (torch.logsumexp(layers, -1).square() * has_trained(batch)[batch.segment_ids]).sum()
    return settings.balance * torch.stack(balance).mean() + settings.small_logits * size


def share(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    return tensor.chunk(size, dim)[rank]


def gate_up(gate: Tensor, up: Tensor, rank: int, size: int) -> Tensor:
    return torch.cat((share(gate, -2, rank, size), share(up, -2, rank, size)), -2)


def qkv(values: dict[str, Tensor], path: str, kind: str, config: Any) -> Tensor:
    """Queries of each key-value head, then its key, then its value."""
    groups, width = config.num_key_value_heads, COMMON["head_dim"]
    parts = (values[f"{path}.{name}_proj.{kind}"] for name in "qkv")
    shaped = (part.reshape(groups, -1, width, *part.shape[1:]) for part in parts)
    return torch.cat(list(shaped), 1).flatten(0, 2)


def slices(values: dict[str, Tensor], config: Any, layers: dict[int, int]) -> dict[str, Tensor]:
    """This rank's parameters by name; `layers`: number of each of its layers -> of the model's."""
    tensor = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    head = "lm_head.weight" if "lm_head.weight" in values else "model.embed_tokens.weight"
    found = {
        "embedding.word_embeddings.weight": share(values["model.embed_tokens.weight"], 0, *tensor),
        "output_layer.weight": share(values[head], 0, *tensor),
        "decoder.final_layernorm.weight": values["model.norm.weight"],
    }
    for here, there in layers.items():
        ours, theirs = f"decoder.layers.{here}.", f"model.layers.{there}."
        if f"{theirs}self_attn.kv_b_proj.weight" in values:
            found |= latents(values, f"{theirs}self_attn.", f"{ours}self_attention.", tensor)
        for kind in ("weight", "bias") if f"{theirs}self_attn.k_proj.weight" in values else ():
            if f"{theirs}self_attn.q_proj.{kind}" in values:
                whole = qkv(values, f"{theirs}self_attn", kind, config)
                found[f"{ours}self_attention.linear_qkv.{kind}"] = share(whole, 0, *tensor)
        o = values[f"{theirs}self_attn.o_proj.weight"]
        found[f"{ours}self_attention.linear_proj.weight"] = share(o, 1, *tensor)
        found[f"{ours}input_layernorm.weight"] = values[f"{theirs}input_layernorm.weight"]
        found[f"{ours}pre_mlp_layernorm.weight"] = values[f"{theirs}post_attention_layernorm.weight"]
        for name in "qk":
            if f"{theirs}self_attn.{name}_norm.weight" in values:
                norm = values[f"{theirs}self_attn.{name}_norm.weight"]
                found[f"{ours}self_attention.{name}_layernorm.weight"] = norm
        found |= {ours + name: value for name, value in mlp(values, f"{theirs}mlp.", tensor).items()}
    return found


def latents(values: dict[str, Tensor], theirs: str, ours: str, tensor: tuple[int, int]) -> dict[str, Tensor]:
    """Narrow projections are whole everywhere, wide ones are shared by heads."""
    whole = {"linear_q_down_proj": "q_a_proj", "q_layernorm": "q_a_layernorm",
             "linear_kv_down_proj": "kv_a_proj_with_mqa", "kv_layernorm": "kv_a_layernorm"}  # fmt: skip
    wide = {"linear_q_proj": "q_proj", "linear_q_up_proj": "q_b_proj", "linear_kv_up_proj": "kv_b_proj"}
    return {
        f"{ours}{name}.weight": share(values[f"{theirs}{other}.weight"], 0, *(tensor if cut else (0, 1)))
        for names, cut in ((whole, False), (wide, True))
        for name, other in names.items()
        if f"{theirs}{other}.weight" in values
    }


def mlp(values: dict[str, Tensor], path: str, tensor: tuple[int, int]) -> dict[str, Tensor]:
    if f"{path}gate_proj.weight" in values:
        return dense(values, path, "mlp", tensor)
    found = {"mlp.router.weight": values[f"{path}gate.weight"]}
    if f"{path}shared_expert_gate.weight" in values:
        found |= dense(values, f"{path}shared_expert.", "mlp.shared_experts", tensor)
        found["mlp.shared_experts.gate_weight"] = values[f"{path}shared_expert_gate.weight"]
    if f"{path}shared_experts.up_proj.weight" in values:
        found |= dense(values, f"{path}shared_experts.", "mlp.shared_experts", tensor)
    if f"{path}gate.{BIAS}" in values:
        found["mlp.router.expert_bias"] = values[f"{path}gate.{BIAS}"]
    expert = mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
    among = mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()
    gate, up = share(values[f"{path}experts.gate_up_proj"], 0, *among).chunk(2, 1)
    down = share(values[f"{path}experts.down_proj"], 0, *among)
    found["mlp.experts.linear_fc1.weight"] = gate_up(gate, up, *expert)
    found["mlp.experts.linear_fc2.weight"] = share(down, 2, *expert)
    return found


def dense(values: dict[str, Tensor], path: str, name: str, tensor: tuple[int, int]) -> dict[str, Tensor]:
    gate, up, down = (values[f"{path}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return {
        f"{name}.linear_fc1.weight": gate_up(gate, up, *tensor),
        f"{name}.linear_fc2.weight": share(down, 1, *tensor),
    }


def context_ranks(kind: str) -> ContextRanks:
    size = mpu.get_context_parallel_world_size()
    group = mpu.get_context_parallel_group() if size > 1 else None
    return ContextRanks(mpu.get_context_parallel_rank(), size, group, kind)


def own_loss(model: Any, batch: Batch, case: Case, context: ContextRanks) -> Tensor:
    """[T] loss of each token through this rank's chunk, gathered from those that share the batch."""
    multiple = case.degrees.get("tensor", 1) if case.degrees.get("sequence") else 1
    whole = context.pad(batch, multiple)
    flat = flat_tokens(whole, context, torch.device("cpu"))
    ids, labels = context.own(whole.input_ids), context.own(whole.labels)
    logits = model(ids[None], None, None, packed_seq_params=flat)  # [1, t, v], or [t, 1, v] without labels
    logits = logits.transpose(0, 1) if logits.shape[0] == 1 else logits
    loss_t = vocab_parallel_cross_entropy(logits.float(), labels.clamp(min=0)[:, None])[:, 0]
    return context.gather(loss_t * (labels != IGNORED))[: batch.num_tokens]


def compare(rank: int, cases: list[dict[str, Any]], world: int) -> None:
    """Losses of every token and gradients of every parameter, over all data ranks: as transformers'."""
    for case in (Case(**fields) for fields in cases):
        join(rank, world, case)
        check(case)
        leave_model_parallel()


def join(rank: int, world: int, case: Case) -> None:
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    join_model_parallel(Ranks(rank, world), Layout(**case.degrees), 60)
    seed_model_parallel(0)


def build(case: Case, model: PreTrainedModel) -> tuple[Any, Any]:
    """The chunk of this rank with the weights of `model`, and its settings."""
    settings = model_settings(model.config, Layout(**case.degrees), torch.float32, **case.chosen)
    (chunk,) = build_chunks(model.config, settings)
    values = slices(model.state_dict(), model.config, numbers(chunk))
    with torch.no_grad():
        for name, parameter in (*chunk.named_parameters(), *chunk.named_buffers()):
            if name in values or isinstance(parameter, torch.nn.Parameter):
                parameter.copy_(values[name])
    return chunk, settings


def numbers(chunk: Any) -> dict[int, int]:
    return {i: layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}


def check(case: Case) -> None:
    model = build_model(case.family)
    chunk, settings = build(case, model)
    wrapped = DistributedDataParallel(
        settings, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk
    )
    context = context_ranks(case.context)
    data_rank, data_world = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    # Both forward before the first backward, as pipelines have it.
    losses = [own_loss(wrapped, batch, case, context) for batch in make_batches(case, data_rank)]
    for loss_T in losses:
        loss_T.sum().backward()
    finalize_model_grads([wrapped], None)
    for other in range(data_world):
        for batch, loss_T in zip(make_batches(case, other), losses, strict=True):
            expected_T = expect(model, batch)
            routing = expect_routing(model, batch, settings) if settings.balance else 0.0
            (expected_T.sum() + routing).backward()
            if other == data_rank:
                torch.testing.assert_close(loss_T, expected_T, rtol=2e-5, atol=2e-5)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected_gradients = slices(gradients, model.config, numbers(chunk))
    for name, parameter in chunk.named_parameters():
        expected_gradient = expected_gradients[name]
        difference = (parameter.main_grad - expected_gradient).norm()
        assert difference <= 1e-5 * expected_gradient.norm(), f"{case}: {name} {difference:.2e}"
    if settings.moe_router_enable_expert_bias:
        check_biases(case, model, chunk, [b for rank in range(data_world) for b in make_batches(case, rank)])


@torch.no_grad()
def check_biases(case: Case, model: PreTrainedModel, chunk: Any, batches: list[Batch]) -> None:
    """A step moves each by its rate, away from how often the segments that train have chosen the expert."""
    chosen: dict[str, Tensor] = {}

    def count(gate: torch.nn.Module, _: Any, output: tuple[Tensor, ...]) -> None:
        picks = torch.bincount(output[2].flatten(), minlength=gate.num_experts)
        chosen[names[gate]] = chosen.get(names[gate], 0) + picks

    names = {m: f"{name}.{BIAS}" for name, m in model.named_modules() if name.endswith(".gate")}
    hooks = [gate.register_forward_hook(count) for gate in names]
    for batch in batches:
        rows = batch.input_ids.split(batch.segment_lengths().tolist())
        for ids, trains in zip(rows, has_trained(batch), strict=True):
            if trains:
                model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    moved = model.state_dict() | {
        name: model.get_buffer(name) + 1e-3 * torch.sign(counts.float().mean() - counts)
        for name, counts in chosen.items()
    }
    expected = slices(moved, model.config, numbers(chunk))
    for name, buffer in chunk.named_buffers():
        if name.endswith("expert_bias"):
            torch.testing.assert_close(buffer, expected[name], rtol=0, atol=1e-7, msg=f"{case}: {name}")


def compare_checkpoints(rank: int, cases: list[dict[str, Any]], world: int) -> None:
    """Our experts name and cut what they save as megatron-core's own do, and put it together again."""
    for case in (Case(**fields) for fields in cases):
        join(rank, world, case)
        chunk, settings = build(case, build_model(case.family))
        ours = chunk.decoder.layers[-1].mlp.experts
        groups = ProcessGroupCollection.use_mpu_process_groups()
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        theirs = SequentialMLP(ours.count, settings, linears, pg_collection=groups)
        with torch.no_grad():
            for i, expert in enumerate(theirs.local_experts):
                expert.linear_fc1.weight.copy_(ours.linear_fc1.weight[i])
                expert.linear_fc2.weight.copy_(ours.linear_fc2.weight[i])
        prefix, offsets = "decoder.layers.mlp.experts.", ((0, 1, 2),)
        found, expected = (saved(experts, prefix, offsets) for experts in (ours, theirs))
        assert found.keys() == expected.keys() and len(found) == 3 * ours.count, (
            found.keys(),
            expected.keys(),
        )
        for place, tensor in expected.items():
            assert torch.equal(found[place], tensor), place
        check_joined(ours, prefix)
        leave_model_parallel()


def saved(experts: Any, prefix: str, offsets: tuple) -> dict[tuple, Tensor]:
    """Each tensor of a checkpoint by key, shape, offset, fragments and copy."""
    state = experts.sharded_state_dict(prefix, offsets)
    state = {name: tensor for name, tensor in state.items() if "extra_state" not in name}
    apply_factories(state)
    found = [t for value in state.values() for t in (value if isinstance(value, list) else [value])]
    return {
        (t.key, t.global_shape, t.global_offset, t.axis_fragmentations, t.replica_id): t.data for t in found
    }


def check_joined(experts: Any, prefix: str) -> None:
    state, factories = experts.sharded_state_dict(prefix), experts.sharded_state_dict(prefix)
    apply_factories(state)
    loaded = {name: [t.data for t in parts] for name, parts in state.items()}
    joined = apply_factory_merges(loaded, factories)
    for name, parameter in experts.named_parameters():
        assert torch.equal(joined[prefix + name], parameter), name


def check_norms(rank: int, folder: str) -> None:
    """Our norm of gradients is megatron-core's, which still makes a list of numbers from the device."""
    assert clip_grads.l2_norm_impl is speed.l2_norm
    assert "torch.tensor(l2)" in inspect.getsource(local_multi_tensor_l2_norm)
    tensors = [torch.randn(5, 7), torch.randn(3), torch.randn(1)]
    ours, theirs = (
        norm(0, None, [tensors], False)[0] for norm in (speed.l2_norm, local_multi_tensor_l2_norm)
    )
    torch.testing.assert_close(ours, theirs)


def check_implementations(rank: int, folder: str) -> None:
    """Without transformer-engine, and with one that does not import."""
    assert implementation.choose_implementation("auto") == "local"
    with pytest.raises(ConfigError, match="--transformer_impl transformer_engine: it is not installed"):
        implementation.choose_implementation("transformer_engine")
    implementation.trouble.cache_clear()
    sys.path.insert(0, folder)
    with pytest.raises(ConfigError, match=r"it does not import: libcublasLt\.so: undefined symbol"):
        implementation.choose_implementation("transformer_engine")
    assert implementation.choose_implementation("auto") == "local"
    with pytest.raises(ImportError):
        __import__("transformer_engine")  # megatron-core asks for ImportError alone
    assert not wgrad.install()  # no cuBLAS without a GPU
    assert "weight gradients added up in a second pass" in implementation.describe_implementation("local")
    for flags, message in (
        ({"moe_grouped_gemm": False}, "--moe_grouped_gemm false: experts always share"),
        ({"gradient_accumulation_fusion": True}, "--gradient_accumulation_fusion true needs a GPU"),
        ({"recompute_modules": ("mla_up_proj",)}, "mla_up_proj: the model has no latent attention"),
        ({"moe_router_bias_update_rate": 0.01}, "_rate 0.01: the model has no biases of experts"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen_settings(MegatronConfig(**flags), build_model("qwen3").config)
    third = build_model("moonlight").config
    with pytest.raises(ConfigError, match=r"_rate 0\.01: adapters hold no biases of experts"):
        chosen_settings(MegatronConfig(moe_router_bias_update_rate=0.01), third, has_adapters=True)
    rates = [
        chosen_settings(MegatronConfig(), third, has_adapters=adapters)["moe_router_bias_update_rate"]
        for adapters in (False, True)
    ]
    assert rates == [0.001, 0]
    third.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ConfigError, match="megatron does not read weights quantised by gptq"):
        block_of(third)
    third.attention_bias = True
    with pytest.raises(ConfigError, match="megatron has no biases in latent attention"):
        model_settings(third, Layout(), torch.float32)
