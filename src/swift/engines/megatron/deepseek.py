"""What DeepSeek-V2 and V3 have of their own: attention over latents, experts that are chosen by group.

Owns: sizes and rules out of config.json, and the choice itself. Not here: layers (latent.py, balance.py).
Sources: arXiv:2405.04434 section 2 (V2), arXiv:2412.19437 section 2.1 (V3).
Shapes: n = tokens, E = experts, G = groups of experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from swift.config.option import ConfigError

FAMILIES = ("deepseek_v2", "deepseek_v3")
BIAS_RATE = 0.001  # arXiv:2412.19437 section 4.2


@dataclass(frozen=True)
class Latent:
    """Sizes of attention whose keys and values come out of one latent for all heads."""

    rank: int  # of keys and values
    query_rank: int | None  # None = queries come out of no latent
    plain: int  # width of a head's query and key that knows no positions
    rotary: int  # the rest of that width
    value: int
    interleaved: bool  # angle i turns columns 2i and 2i + 1; else i and i + rotary / 2
    rotary_factor: float  # of cosines and sines, by rope scaling
    scale: float  # of scores

    @property
    def width(self) -> int:
        """Of a head's query and key."""
        return self.plain + self.rotary


@dataclass(frozen=True)
class Routing:
    """How a token chooses its experts."""

    experts: int  # that it chooses
    groups: int
    kept: int  # groups that it chooses among
    best: int  # of a group's scores, whose sum is the group's
    is_sigmoid: bool  # scores; else softmax
    is_normalised: bool  # weights of the chosen ones, to a sum of one
    factor: float  # of weights


def deepseek_fields(hf: PretrainedConfig, rope: LlamaRotaryEmbedding) -> dict[str, Any]:
    """Fields of Settings; none for other families. Raises ConfigError for biases, which no layer here has."""
    if hf.model_type not in FAMILIES:
        return {}
    if hf.attention_bias:
        raise ConfigError("megatron has no biases in latent attention", hint="use swift sft")
    latent = latent_of(hf, rope)
    is_third = hf.model_type == "deepseek_v3"
    limited = is_third or hf.topk_method == "group_limited_greedy"
    return {
        "latent": latent,
        "attention_factor": 1.0,  # it is of the rotary part alone
        "num_query_groups": hf.num_attention_heads,
        "kv_channels": latent.width,
        "routing": Routing(
            experts=hf.num_experts_per_tok,
            groups=hf.n_group if limited else 1,
            kept=hf.topk_group if limited else 1,
            best=2 if is_third else 1,
            is_sigmoid=is_third,
            # transformers has no such weights in V2, whatever config.json says.
            is_normalised=is_third and bool(hf.norm_topk_prob),
            factor=hf.routed_scaling_factor,
        ),
        "moe_router_score_function": "sigmoid" if is_third else "softmax",
        "moe_router_enable_expert_bias": is_third,
        "moe_shared_expert_intermediate_size": hf.n_shared_experts * hf.moe_intermediate_size,
    }


def latent_of(hf: PretrainedConfig, rope: LlamaRotaryEmbedding) -> Latent:
    """Sizes of a model; YaRN's factor of scores is that of all dimensions, arXiv:2309.00071 section 3.4."""
    told = hf.rope_parameters
    width = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    scale = width**-0.5
    if told.get("mscale_all_dim") and rope.rope_type != "default" and told["factor"] > 1:
        scale *= (0.1 * told["mscale_all_dim"] * math.log(told["factor"]) + 1) ** 2
    return Latent(
        rank=hf.kv_lora_rank,
        query_rank=hf.q_lora_rank,
        plain=hf.qk_nope_head_dim,
        rotary=hf.qk_rope_head_dim,
        value=hf.v_head_dim,
        interleaved=bool(getattr(hf, "rope_interleave", True)),
        rotary_factor=rope.attention_scaling,
        scale=scale,
    )


def choose_experts(logits: Tensor, bias: Tensor | None, rules: Routing) -> tuple[Tensor, Tensor]:
    """logits [n, E] -> weights of the chosen experts [n, E], 0 for others, and which these are, bool [n, E].

    bias [E] is added to scores where experts are chosen, not where they are weighed. megatron-core's own
    rule differs: groups have the sum of as many scores as experts are chosen in each, and weights are
    always normalised.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.sigmoid() if rules.is_sigmoid else logits.softmax(-1)
    choice = scores.detach() if bias is None else scores.detach() + bias
    if rules.kept < rules.groups:
        groups = choice.unflatten(-1, (rules.groups, -1))
        best_nG = groups.topk(rules.best, -1).values.sum(-1)
        is_out = torch.ones_like(best_nG, dtype=torch.bool)
        is_out = is_out.scatter(-1, best_nG.topk(rules.kept, -1).indices, False)
        choice = groups.masked_fill(is_out[..., None], -math.inf).flatten(-2)
    picks = choice.topk(rules.experts, -1).indices
    weights = scores.gather(-1, picks)
    if rules.is_normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    chosen = torch.zeros_like(logits).scatter(-1, picks, 1.0).bool()
    return torch.zeros_like(logits).scatter(-1, picks, weights * rules.factor), chosen
