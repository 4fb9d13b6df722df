"""Attention over latents: the keys and values of all heads come out of one narrow latent for each token.

Modules have the names of megatron-core's own, which is not used: split over tensor ranks without
transformer-engine, it loses what other ranks' heads add to the gradient of the key that all share. Here
every tensor rank holds the narrow projections whole and applies them to its own tokens.
Shapes: t = tokens of this context rank, s = those of this tensor rank, H = heads of this rank.
Source: arXiv:2405.04434 section 2.1.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from swift.engines.megatron.deepseek import Latent
from swift.engines.megatron.layers import CoreAttention, FlatTokens, RMSNorm
from swift.engines.megatron.settings import Settings

EPSILON = 1e-6  # of the norms of latents, whatever config.json says of the others
# Checkpoints name them as transformer-engine's layers do, which hold norms in the linear that follows.
NORMS = {
    f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")
}


class WholeLinear(nn.Module):
    """A linear layer that all tensor ranks hold, each for its own tokens."""

    explicit_expert_comm = False

    def __init__(self, config: Settings, columns: int, rows: int) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype, device=device))
        # Then megatron-core adds up its gradient over the tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return F.linear(hidden, self.weight), None


class LatentAttention(MegatronModule):
    """Causal attention within segments, in megatron-core's place for it."""

    def __init__(self, config: Settings, layer_number: int, pg_collection: Any, **_: Any) -> None:
        super().__init__(config=config)
        sizes, ranks = config.latent, pg_collection.tp
        assert sizes and (config.sequence_parallel or ranks.size() == 1)
        self.sizes: Latent = sizes
        self.heads = config.num_attention_heads // ranks.size()
        common: dict[str, Any] = {
            "config": config, "init_method": config.init_method, "bias": False, "tp_group": ranks,
            "is_expert": False,
        }  # fmt: skip

        def widen(columns: int, width: int) -> ColumnParallelLinear:
            rows = config.num_attention_heads * width
            return ColumnParallelLinear(columns, rows, gather_output=False, **common)

        if sizes.query_rank:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, sizes.query_rank)
            self.q_layernorm = RMSNorm(config, sizes.query_rank, EPSILON)
            self.linear_q_up_proj = widen(sizes.query_rank, sizes.width)
        else:
            self.linear_q_proj = widen(config.hidden_size, sizes.width)
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, sizes.rank + sizes.rotary)
        self.kv_layernorm = RMSNorm(config, sizes.rank, EPSILON)
        self.linear_kv_up_proj = widen(sizes.rank, sizes.plain + sizes.value)
        self.core_attention = CoreAttention(config, layer_number, sizes.scale)
        self.linear_proj = RowParallelLinear(
            config.num_attention_heads * sizes.value, config.hidden_size,
            input_is_parallel=True, skip_bias_add=True, **common,
        )  # fmt: skip
        selective = config.recompute_granularity == "selective"
        self.recomputes_scores = selective and "core_attn" in (config.recompute_modules or ())

    def forward(
        self, hidden: Tensor, *, rotary_pos_emb: Tensor, packed_seq_params: FlatTokens, **_: Any
    ) -> tuple[Tensor, None]:
        """hidden [s, 1, D] and angles [t, 1, 1, rotary] -> [s, 1, D] and no bias."""
        query, sizes = hidden, self.sizes
        if sizes.query_rank:
            query = self.q_layernorm(self.linear_q_down_proj(hidden)[0])
        latent, turned = self.linear_kv_down_proj(hidden)[0].split((sizes.rank, sizes.rotary), -1)
        if self.config.sequence_parallel:
            turned = gather_from_sequence_parallel_region(turned)
        inputs = query, self.kv_layernorm(latent), turned, rotary_pos_emb
        wide = CheckpointWithoutOutput() if self.config.recompute_latents and self.training else None
        heads = wide.checkpoint(self.expand, *inputs) if wide else self.expand(*inputs)
        attend = partial(self.core_attention, packed_seq_params=packed_seq_params)
        again = self.recomputes_scores and self.training
        output = checkpoint(attend, False, *heads) if again else attend(*heads)
        if wide:
            wide.discard_output_and_register_recompute(output)
        values = output.unflatten(-1, (self.heads, -1))[..., : sizes.value]
        return self.linear_proj(values.flatten(-2))

    def expand(
        self, query: Tensor, latent: Tensor, turned: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [t, 1, H, width] each; `turned` [t, 1, rotary] is part of every key.

        Values are filled up to the width of keys: not every kernel takes others.
        """
        sizes = self.sizes
        widen = self.linear_q_up_proj if sizes.query_rank else self.linear_q_proj
        queries, both = (
            x.unflatten(-1, (self.heads, -1)) for x in (widen(query)[0], self.linear_kv_up_proj(latent)[0])
        )
        plain, rotary = queries.split((sizes.plain, sizes.rotary), -1)
        key, value = both.split((sizes.plain, sizes.value), -1)
        shared = turn(turned[:, :, None], angles, sizes).expand(-1, -1, self.heads, -1)
        return (
            torch.cat((plain, turn(rotary, angles, sizes)), -1),
            torch.cat((key, shared), -1),
            F.pad(value, (0, max(sizes.width - sizes.value, 0))),
        )


def turn(columns: Tensor, angles: Tensor, sizes: Latent) -> Tensor:
    """columns [t, 1, H, rotary] turned in pairs; angles [t, 1, 1, rotary] hold each twice.

    The first of all pairs come first in what is given out: queries and keys are in one order, which is all
    that scores depend on.
    """
    half = angles[..., : sizes.rotary // 2]
    cosine, sine = ((f(half) * sizes.rotary_factor).to(columns.dtype) for f in (torch.cos, torch.sin))
    first, second = (columns[..., ::2], columns[..., 1::2]) if sizes.interleaved else columns.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
