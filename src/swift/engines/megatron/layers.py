"""The parts of a layer that megatron-core leaves to transformer-engine or apex, from torch alone.

Shapes: t = flat tokens of this rank, H = query heads, K = key-value heads, D = head width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from swift.batch import Batch
from swift.engines.attention import Heads, attend
from swift.engines.megatron.context import ContextRanks, Stretch
from swift.engines.megatron.settings import Settings
from swift.objectives.sft import has_trained

ALONE = ContextRanks()


@dataclass
class FlatTokens(PackedSeqParams):
    """What layers have to know of a flat batch; megatron-core hands it on to all of them.

    It is no `thd` batch to megatron-core, which would cut rotary angles and heads by rules of its own.
    """

    positions: Tensor | None = None  # int64 [t]: place of each token of this rank in its segment
    stretches: tuple[Stretch, ...] = ()  # of this rank's queries
    context: ContextRanks = ALONE
    segment_ids: Tensor | None = None  # int64 [t]
    weights: Tensor | None = None  # float32 [S]: 1 / tokens of a segment that trains, 0 for one that does not


def flat_tokens(batch: Batch, context: ContextRanks, device: torch.device) -> FlatTokens:
    """Of a batch on the host that is padded already (`ContextRanks.pad`)."""
    lengths = batch.segment_lengths()
    weights = has_trained(batch) / lengths
    return FlatTokens(
        positions=context.own(batch.positions()).to(device, non_blocking=True),
        stretches=context.stretches(lengths.tolist(), device),
        context=context,
        segment_ids=context.own(batch.segment_ids).to(device, non_blocking=True),
        weights=weights.to(device, non_blocking=True),
    )


class RMSNorm(nn.Module):
    """torch's RMS norm; with sequence parallelism megatron-core sums its gradient over the tensor ranks."""

    def __init__(self, config: Settings, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.shape, self.weight, self.eps)


class Head(nn.Module):
    """A small output layer that every tensor rank holds whole; megatron-core calls it as its own.

    All of them have the same rows and the same loss, so that there is nothing to exchange.
    """

    def __init__(self, config: Settings, outputs: int) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.empty(outputs, config.hidden_size, dtype=config.params_dtype, device=device)
        )
        self.sequence_parallel = config.sequence_parallel
        self.share: Any = None  # of one that is trained beside adapters (lora.py)

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[N, 1, D] -> [N, 1, outputs], and no bias."""
        return F.linear(hidden, self.weight), None


class Rotary(nn.Module):
    """Rotary angles at the positions of a flat batch, with the frequencies that transformers gives the model.

    megatron-core asks for a length and then for the angles of that length: positions take its place.
    """

    def __init__(self, hf_config: PretrainedConfig) -> None:
        super().__init__()
        self.rope = LlamaRotaryEmbedding(hf_config)

    def get_rotary_seq_len(
        self, _context: Any, _block: Any, _input: Any, _config: Any, flat: FlatTokens
    ) -> Tensor:
        assert flat.positions is not None
        return flat.positions

    def forward(self, positions: Tensor, **_: Any) -> Tensor:
        """[t, 1, 1, D] angles, float32."""
        frequencies = self.rope.inv_freq.to(positions.device, torch.float32)
        angles = positions[:, None].float() * frequencies
        return torch.cat((angles, angles), dim=-1)[:, None, None]


class CoreAttention(MegatronModule):
    """Causal attention within segments, by torch's kernels."""

    def __init__(
        self, config: Settings, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        width = config.kv_channels
        assert width is not None
        self.scale = (softmax_scale or 1.0 / math.sqrt(width)) * config.attention_factor
        self.window = config.windows[layer_number - 1] if config.windows else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None = None,
        packed_seq_params: FlatTokens | None = None,
        **_: Any,
    ) -> Tensor:
        """query [t, 1, H, D], key and value [t, 1, K, D] -> [t, 1, H * D]."""
        flat = packed_seq_params
        assert flat is not None and flat.stretches
        context, spread = flat.context, flat.context.size > 1
        if spread and context.kind == "all_gather":
            key, value = context.gather_keys(torch.cat((key, value), -1)).split(key.shape[-1], -1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if spread and context.kind == "a2a":
            q, k, v = context.spread_heads(q, k, v)
        output = self.attend(q, k, v, flat.stretches)
        if spread and context.kind == "a2a":
            output = context.spread_tokens(output)
        return output.permute(2, 0, 1, 3).flatten(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, stretches: tuple[Stretch, ...]) -> Tensor:
        """[1, H, t, D] over keys and values [1, K, T, D]."""
        dropout = self.config.attention_dropout if self.training else 0.0
        outputs = []
        queries = query.split([sum(stretch.queries.lengths) for stretch in stretches], dim=2)
        for q, stretch in zip(queries, stretches, strict=True):
            k, v = (x[:, :, stretch.first_key : stretch.last_key] for x in (key, value))
            outputs.append(attend(Heads(q, k, v, self.scale, self.window, dropout), stretch.queries))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
