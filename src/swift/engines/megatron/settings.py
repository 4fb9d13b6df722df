"""From a model's HF config and the flags to megatron-core's TransformerConfig. Not here: any module."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from swift.config.layout import Layout
from swift.config.megatron import MegatronConfig
from swift.config.option import ConfigError
from swift.engines.attention import PLAIN_LAYERS
from swift.engines.megatron import wgrad
from swift.engines.megatron.deepseek import BIAS_RATE, Latent, Routing, deepseek_fields
from swift.engines.megatron.deepseek import FAMILIES as DEEPSEEK
from swift.engines.megatron.implementation import ENGINE, choose_implementation
from swift.utils.log import warn

FAMILIES = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral", *DEEPSEEK)
OF_EXPERTS = (  # flags that are fields
    "moe_token_dispatcher_type", "moe_shared_expert_overlap", "moe_router_dtype",
    "moe_expert_capacity_factor",
)  # fmt: skip
CHANGING_ROPE = ("dynamic", "longrope")  # whose frequencies depend on the length of the row


@dataclass
class Settings(TransformerConfig):
    """megatron-core's own config, and what its attention does not know of."""

    attention_factor: float = 1.0  # of softmax scales, by rope scaling
    balance: float = 0.0  # weight of the experts' balance, a mean over layers (balance.py)
    small_logits: float = 0.0  # weight of the routers' squared logits, a sum over layers
    per_token: float = 1.0  # what a token counts in those two; the engine sets it for each step
    windows: tuple[int | None, ...] = ()  # of sliding attention, by layer; none = no layer slides
    # Outputs of a head in place of the vocabulary's; 0 = what would enter it; none = a language model.
    head: int | None = None
    latent: Latent | None = None  # sizes of attention over latents; none = heads have keys of their own
    recompute_latents: bool = False  # what comes out of them
    routing: Routing | None = None  # none = megatron-core's rules

    @property
    def sparse(self) -> list[int]:
        """1 for each layer of the model that has experts, 0 for the others."""
        if isinstance(self.moe_layer_freq, list):
            return self.moe_layer_freq
        return [int(bool(self.num_moe_experts))] * self.num_layers


def model_settings(hf: PretrainedConfig, degrees: Layout, dtype: torch.dtype, **chosen: Any) -> Settings:
    """Settings of `hf` on `degrees`; `chosen` are fields of TransformerConfig that flags decide.

    Raises ConfigError for a model whose layers megatron-core does not have.
    """
    if hf.model_type not in FAMILIES:
        raise ConfigError(
            f"megatron does not know {hf.model_type} models",
            hint=f"it knows {', '.join(FAMILIES)}; use swift sft",
        )
    rope = LlamaRotaryEmbedding(hf)
    if rope.rope_type in CHANGING_ROPE:
        raise ConfigError(
            f"megatron does not have rope scaling of type {rope.rope_type}", hint="use swift sft"
        )
    strange = sorted(set(getattr(hf, "layer_types", None) or ()) - PLAIN_LAYERS)
    if strange:
        raise ConfigError(f"megatron does not have layers of type {strange[0]}", hint="use swift sft")
    heads = hf.num_attention_heads
    on_gpu = torch.cuda.is_available()
    fields: dict[str, Any] = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        "ffn_hidden_size": hf.intermediate_size,
        "layernorm_epsilon": hf.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": has_qkv_bias(hf),
        "qk_layernorm": hf.model_type.startswith("qwen3"),
        "attention_dropout": getattr(hf, "attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "attention_factor": rope.attention_scaling**2,
        "windows": layer_windows(hf),
        "tensor_model_parallel_size": degrees.tensor,
        "pipeline_model_parallel_size": degrees.pipeline,
        "virtual_pipeline_model_parallel_size": degrees.virtual,
        "context_parallel_size": degrees.context,
        "expert_model_parallel_size": degrees.expert,
        "expert_tensor_parallel_size": degrees.expert_tensor,
        "sequence_parallel": degrees.sequence,
        "variable_seq_lengths": degrees.pipeline > 1,
        "moe_token_dispatcher_type": "alltoall",
        "use_cpu_initialization": not on_gpu,
        "perform_initialization": False,
        "bias_dropout_fusion": on_gpu,
        "bias_activation_fusion": on_gpu,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": on_gpu and wgrad.MODULE in sys.modules,
        "transformer_impl": "local",
        "calculate_per_token_loss": True,
        # Two stages with several chunks each exchange both ways at once: not in one unordered batch.
        "overlap_p2p_comm": bool(degrees.virtual),
        "batch_p2p_comm": not degrees.virtual,
        "deallocate_pipeline_outputs": True,
    }
    return Settings(**fields | expert_fields(hf) | deepseek_fields(hf, rope) | chosen)


def has_qkv_bias(hf: PretrainedConfig) -> bool:
    """Whether queries, keys and values have biases; each family has its own way to say so."""
    if hf.model_type == "qwen2":
        return True
    return bool(getattr(hf, "qkv_bias", getattr(hf, "attention_bias", False)))


def chosen_settings(
    flags: MegatronConfig, hf: PretrainedConfig, *, has_adapters: bool = False
) -> dict[str, Any]:
    """The fields of TransformerConfig that flags decide. `has_adapters`: they alone are trained."""
    chosen: dict[str, Any] = {"transformer_impl": choose_implementation(flags.transformer_impl)}
    if flags.moe_permute_fusion and chosen["transformer_impl"] == ENGINE:
        chosen["moe_permute_fusion"] = True
    elif flags.moe_permute_fusion:
        warn("--moe_permute_fusion true is a kernel of transformer-engine: tokens are sorted in two passes")
    if not flags.moe_grouped_gemm:
        raise ConfigError(
            "--moe_grouped_gemm false: experts always share one matrix product here", hint="leave it out"
        )
    if flags.gradient_accumulation_fusion and wgrad.MODULE not in sys.modules:
        raise ConfigError(
            "--gradient_accumulation_fusion true needs a GPU, whose cuBLAS does it", hint="leave it out"
        )
    if flags.gradient_accumulation_fusion is not None:
        chosen["gradient_accumulation_fusion"] = flags.gradient_accumulation_fusion
    chosen |= recompute_fields(flags, hf)
    for end in ("first", "last"):
        count = getattr(flags, f"decoder_{end}_pipeline_num_layers")
        if count is not None:
            chosen[f"num_layers_in_{end}_pipeline_stage"] = count
    if expert_fields(hf):
        chosen |= {name: getattr(flags, name) for name in OF_EXPERTS}
        chosen |= {"balance": flags.moe_aux_loss_coeff, "small_logits": flags.moe_z_loss_coeff or 0.0}
    return chosen | {"moe_router_bias_update_rate": bias_rate(flags, hf, has_adapters=has_adapters)}


def bias_rate(flags: MegatronConfig, hf: PretrainedConfig, *, has_adapters: bool) -> float:
    """How far a step moves the biases of experts; ConfigError where none can move."""
    has_biases, rate = hf.model_type == "deepseek_v3", flags.moe_router_bias_update_rate
    if rate and (has_adapters or not has_biases):
        why = "adapters hold no biases of experts" if has_biases else "the model has no biases of experts"
        raise ConfigError(f"--moe_router_bias_update_rate {rate}: {why}", hint="leave it out")
    return rate if rate is not None else BIAS_RATE * (has_biases and not has_adapters)


def recompute_fields(flags: MegatronConfig, hf: PretrainedConfig) -> dict[str, Any]:
    """What the backward pass computes again."""
    if flags.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": flags.recompute_method,
            "recompute_num_layers": flags.recompute_num_layers,
        }
    # Attention keeps no scores that could be saved; keys of other context ranks are what it holds on to.
    idle = {"core_attn"} if flags.context_parallel_size == 1 else set()
    if flags.recompute_granularity == "none":
        return {}
    latents = "mla_up_proj" in flags.recompute_modules
    if latents and hf.model_type not in DEEPSEEK:
        raise ConfigError(
            "--recompute_modules mla_up_proj: the model has no latent attention", hint="leave it out"
        )
    modules = [name for name in flags.recompute_modules if name not in idle | {"mla_up_proj"}]
    selective = {"recompute_granularity": "selective", "recompute_modules": modules}
    return {"recompute_latents": latents} | (selective if modules else {})


def expert_fields(hf: PretrainedConfig) -> dict[str, Any]:
    """The fields of a mixture of experts; none for a dense model."""
    experts = getattr(hf, "num_experts", None) or getattr(hf, "num_local_experts", None)
    if not experts:
        return {}
    fields = {
        "num_moe_experts": experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_ffn_hidden_size": getattr(hf, "moe_intermediate_size", hf.intermediate_size),
        # Softmax over the chosen experts alone is softmax over all, normalised to the chosen ones.
        "moe_router_pre_softmax": not getattr(hf, "norm_topk_prob", True),
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": True,
    }
    sparse = sparse_layers(hf)
    if not all(sparse):
        fields["moe_layer_freq"] = sparse
    shared = getattr(hf, "shared_expert_intermediate_size", 0)
    if shared:
        fields |= {"moe_shared_expert_intermediate_size": shared, "moe_shared_expert_gate": True}
    return fields


def sparse_layers(hf: PretrainedConfig) -> list[int]:
    """1 for each layer that has experts, 0 for one that is dense."""
    step, dense = getattr(hf, "decoder_sparse_step", 1), getattr(hf, "mlp_only_layers", None) or ()
    dense = {*dense, *range(getattr(hf, "first_k_dense_replace", 0))}
    return [int((i + 1) % step == 0 and i not in dense) for i in range(hf.num_hidden_layers)]


def layer_windows(hf: PretrainedConfig) -> tuple[int | None, ...]:
    """Width of the sliding window of each layer, empty where no layer has one."""
    window = getattr(hf, "sliding_window", None)
    if not window or not getattr(hf, "use_sliding_window", True):
        return ()
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
