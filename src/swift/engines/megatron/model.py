"""A model of megatron-core from its settings: the chunks of layers that this rank holds, without weights."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn
from transformers import PretrainedConfig

from swift.engines.megatron.balance import BalancedRouter, watch_batches
from swift.engines.megatron.experts import GroupedExperts
from swift.engines.megatron.implementation import ENGINE
from swift.engines.megatron.latent import NORMS, LatentAttention
from swift.engines.megatron.layers import CoreAttention, Head, RMSNorm, Rotary
from swift.engines.megatron.settings import Settings

# Checkpoints name norms as transformer-engine's layers do, which hold them in the linear that follows.
NORM_OF_ATTENTION = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
NORM_OF_MLP = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def layer_specs(settings: Settings, stage: int | None) -> list[ModuleSpec]:
    """The layers of one chunk of this rank; `stage` counts its chunks, where it has several."""
    count = get_num_layers_to_build(settings, stage)
    first = get_transformer_layer_offset(settings, stage)
    build = fast_layer_spec if settings.transformer_impl == ENGINE else layer_spec
    return [build(settings, is_sparse=bool(settings.sparse[first + i])) for i in range(count)]


def fast_layer_spec(settings: Settings, *, is_sparse: bool) -> ModuleSpec:
    """One decoder layer of transformer-engine's modules around our attention."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=settings.num_moe_experts if is_sparse else None,
        moe_grouped_gemm=settings.moe_grouped_gemm,
        qk_layernorm=settings.qk_layernorm,
        multi_latent_attention=settings.latent is not None,
    )
    if settings.latent:
        spec.submodules.self_attention = ModuleSpec(module=LatentAttention)
        spec.submodules.sharded_state_dict_keys_map = NORMS
    else:
        spec.submodules.self_attention.submodules.core_attention = CoreAttention
    if is_sparse:
        spec.submodules.mlp.submodules.router = BalancedRouter
    return spec


def layer_spec(settings: Settings, *, is_sparse: bool) -> ModuleSpec:
    """One decoder layer of torch kernels."""
    head_norm = RMSNorm if settings.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    names = NORM_OF_ATTENTION
    if settings.latent:
        attention, names = ModuleSpec(module=LatentAttention), NORMS
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = ModuleSpec(module=MLP, submodules=linears)
    if is_sparse:
        shared = ModuleSpec(module=SharedExpertMLP, submodules=linears)
        experts = ModuleSpec(module=GroupedExperts)
        submodules = MoESubmodules(experts=experts, shared_experts=shared, router=BalancedRouter)
        mlp = ModuleSpec(module=MoELayer, submodules=submodules)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names | ({} if is_sparse else NORM_OF_MLP),
        ),
    )


def padded_vocabulary(hf: PretrainedConfig, settings: Settings) -> int:
    """Rows of the embedding: the vocabulary, and as many more as make equal shares for the tensor ranks."""
    ranks = settings.tensor_model_parallel_size
    return -(-hf.vocab_size // ranks) * ranks


def build_chunks(hf: PretrainedConfig, settings: Settings) -> list[GPTModel]:
    """The chunks of this rank, in the order in which tokens pass through them. Weights are not set."""
    virtual = settings.virtual_pipeline_model_parallel_size
    return [build_chunk(hf, settings, stage if virtual else None) for stage in range(virtual or 1)]


def keep_padding(embedding: VocabParallelEmbedding, token: int) -> None:
    """The embedding of the padding token gets no gradient from its place in rows, as in transformers.

    This shows where a chat template ends turns with that token.
    """

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = inputs[0]
        if embedding.reduce_scatter_embeddings:  # [t, 1, D] of this tensor rank instead of [1, T, D]
            group = embedding.tp_group
            ids = ids.transpose(0, 1).chunk(group.size())[group.rank()]
        return torch.where((ids == token)[..., None], output.detach(), output)

    embedding.register_forward_hook(stop)


def mark_shares(chunk: GPTModel) -> None:
    """Tells which tensors are shares of larger ones; megatron-core does so only where it draws their values.

    Norms of gradients count a tensor without the mark on one tensor rank alone.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            axis = 1 if isinstance(module, RowParallelLinear) else 0
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > axis and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, axis, 1)


def replace_output(chunk: GPTModel, settings: Settings) -> None:
    """Puts a head in place of the output layer; for none, the layer stays and lets everything through."""
    if settings.head:
        chunk.output_layer = Head(settings, settings.head)
        return
    is_copy = chunk.share_embeddings_and_output_weights and not chunk.pre_process

    def let_through(hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        # The embedding's copy on the last stage learns from the first one, and waits for a gradient here.
        return hidden + weight[0, 0] * 0 if is_copy and weight is not None else hidden, None

    chunk.output_layer.forward = let_through
    if not chunk.share_embeddings_and_output_weights:
        chunk.output_layer.requires_grad_(False)


def draw_head(chunks: Sequence[GPTModel], hf: PretrainedConfig, seed: int) -> None:
    """A new head as transformers draws it, the same on all ranks that have it."""
    for chunk in chunks:
        if chunk.post_process:
            weight = chunk.output_layer.weight
            drawn = torch.empty(weight.shape, dtype=weight.dtype)
            drawn.normal_(0, hf.initializer_range, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                weight.copy_(drawn)


def build_chunk(hf: PretrainedConfig, settings: Settings, stage: int | None) -> GPTModel:
    """One chunk; `stage` counts those of a rank that has several."""
    which: dict[str, Any] = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}
    chunk = GPTModel(
        config=settings,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs(settings, stage), layer_norm=RMSNorm),
        vocab_size=padded_vocabulary(hf, settings),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**which),
        post_process=parallel_state.is_pipeline_last_stage(**which),
        share_embeddings_and_output_weights=hf.tie_word_embeddings and not settings.head,
        position_embedding_type="rope",
        parallel_output=True,
        **({} if stage is None else {"vp_stage": stage}),
    )
    if settings.head is not None and chunk.post_process:
        replace_output(chunk, settings)
    mark_shares(chunk)
    if chunk.pre_process and getattr(hf, "pad_token_id", None) is not None:
        keep_padding(chunk.embedding.word_embeddings, hf.pad_token_id)
    watch_batches(chunk)
    chunk.rotary_pos_emb = Rotary(hf)
    chunk.model_type = ModelType.encoder_or_decoder
    # Routers make their buffers on the GPU in any case.
    return chunk.to("cpu" if settings.use_cpu_initialization else torch.cuda.current_device())
