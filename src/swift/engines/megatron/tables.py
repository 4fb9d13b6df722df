"""Which tensors of a published model a parameter of megatron-core is made of, family by family.

Owns: names. Not here: how parameters are cut (pieces.py), reading and sending them (bridge.py).
In names, `{}` is the layer and `*` the expert.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

LAYER = "model.layers.{}."


@dataclass(frozen=True)
class Row:
    """One kind of parameter.

    names: what megatron-core calls it, within a layer without `decoder.layers.N.`; first in layers of torch
        kernels, then in those of transformer-engine where that differs.
    kind: how it is cut over ranks and put together (pieces.py).
    files: the tensors that it is made of.
    """

    names: tuple[str, ...]
    kind: str
    files: tuple[str, ...]


def in_layer(names: str, kind: str, *files: str) -> Row:
    """A row of a layer; `names` are separated by blanks."""
    return Row(tuple(names.split()), kind, tuple(LAYER + file for file in files))


def experts(prefix: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The router and its experts: stacked, or weights of one module (TEGroupedLinear)."""
    each = f"{prefix}.experts.*"
    return (
        in_layer("mlp.router.weight", "copy", f"{prefix}.gate.weight"),
        in_layer(
            "mlp.experts.linear_fc1.weight mlp.experts.linear_fc1.weight*",
            "gate_up",
            f"{each}.{gate}.weight",
            f"{each}.{up}.weight",
        ),
        in_layer(
            "mlp.experts.linear_fc2.weight mlp.experts.linear_fc2.weight*", "row", f"{each}.{down}.weight"
        ),
    )


def shared(prefix: str) -> tuple[Row, ...]:
    """The experts that all tokens see."""
    gate_up = (f"{prefix}.{x}_proj.weight" for x in ("gate", "up"))
    return (
        in_layer("mlp.shared_experts.linear_fc1.weight", "gate_up", *gate_up),
        in_layer("mlp.shared_experts.linear_fc2.weight", "row", f"{prefix}.down_proj.weight"),
    )


COMMON = (
    Row(("embedding.word_embeddings.weight",), "vocabulary", ("model.embed_tokens.weight",)),
    Row(("decoder.final_layernorm.weight",), "copy", ("model.norm.weight",)),
    Row(("output_layer.weight",), "vocabulary", ("lm_head.weight",)),
    in_layer(
        "input_layernorm.weight self_attention.linear_qkv.layer_norm_weight", "copy", "input_layernorm.weight"
    ),
    in_layer(
        "pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight", "copy", "post_attention_layernorm.weight"
    ),
    *(
        in_layer(f"self_attention.linear_qkv.{part}", "qkv", *(f"self_attn.{x}_proj.{part}" for x in "qkv"))
        for part in ("weight", "bias")
    ),
    in_layer("self_attention.linear_proj.weight", "row", "self_attn.o_proj.weight"),
    *(in_layer(f"self_attention.{x}_layernorm.weight", "copy", f"self_attn.{x}_norm.weight") for x in "qk"),
    in_layer("mlp.linear_fc1.weight", "gate_up", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    in_layer("mlp.linear_fc2.weight", "row", "mlp.down_proj.weight"),
)
# Where the head is tied and on another pipeline stage than the embedding, that stage has a copy.
TIED = (Row(("output_layer.weight",), "vocabulary", ("model.embed_tokens.weight",)),)
HEAD = "score.weight"
SCORING = (Row(("output_layer.weight",), "copy", (HEAD,)),)
QWEN = experts("mlp", "gate_proj", "up_proj", "down_proj")
DEEPSEEK = (
    *QWEN,
    in_layer("mlp.router.expert_bias", "copy", "mlp.gate.e_score_correction_bias"),
    *shared("mlp.shared_experts"),
    *(
        in_layer(f"self_attention.{ours}.weight", kind, f"self_attn.{theirs}.weight")
        for ours, kind, theirs in (
            ("linear_q_proj", "column", "q_proj"),
            ("linear_q_down_proj", "whole", "q_a_proj"),
            ("q_layernorm", "copy", "q_a_layernorm"),
            ("linear_q_up_proj", "column", "q_b_proj"),
            ("linear_kv_down_proj", "whole", "kv_a_proj_with_mqa"),
            ("kv_layernorm", "copy", "kv_a_layernorm"),
            ("linear_kv_up_proj", "column", "kv_b_proj"),
        )
    ),
)
FAMILIES = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "qwen2_moe": (
        *QWEN,
        *shared("mlp.shared_expert"),
        in_layer("mlp.shared_experts.gate_weight", "copy", "mlp.shared_expert_gate.weight"),
    ),
    "qwen3_moe": QWEN,
    "mixtral": experts("block_sparse_moe", "w1", "w3", "w2"),
}


def rows_of(hf: PretrainedConfig, *, head: bool = False) -> dict[str, Row]:
    """The rows of a family, or of one with a head, by every name of theirs in megatron-core."""
    output = SCORING if head else TIED if hf.tie_word_embeddings else ()
    rows = (*COMMON, *FAMILIES.get(hf.model_type, ()), *output)
    return {name: row for row in rows for name in row.names}
