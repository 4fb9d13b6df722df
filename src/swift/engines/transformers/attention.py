"""Attention over flat tokens, registered with transformers: segments never see each other, no mask is built.

Shapes: T = flat tokens, H = query heads, K = key-value heads, D = head width.
Not here: the choice between this and padding (forward.py).
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from swift.engines.transformers.sequence_parallel import SequenceRanks

try:  # torch's own variable-length flash kernel, the fast path on a GPU
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

FLAT_ATTENTION = "swift_flat"
VARLEN_PARAMETERS = set(inspect.signature(varlen_attn).parameters) if varlen_attn else set()
HAS_VARLEN = "window_size" in VARLEN_PARAMETERS  # 2.10 has another signature
VARLEN_GROUPS = {"enable_gqa": True} if "enable_gqa" in VARLEN_PARAMETERS else {}  # 2.11 groups heads unasked


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    """What attention has to know of a flat batch: one object, which compiled layers hand on unseen."""

    lengths: list[int]
    bounds: Tensor  # int32 [S + 1], cumulative
    sequence: SequenceRanks | None = None  # ranks that share the batch; the segments are of the whole


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[L, L] bool: token i sees the last `window` tokens up to and including itself."""
    i = torch.arange(length, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)


def segmented_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """[1, H, T, D] causal attention, one SDPA call a segment: exact, linear in the number of segments."""
    outputs, options = [], {"scale": scaling, "dropout_p": dropout, "enable_gqa": True}
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = window_mask(length, window, q.device) if window and length > window else None
        causal = mask is None
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **options))
    return torch.cat(outputs, dim=2)


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D].

    `segments` arrive through the model; where T is spread over ranks, the tensors are slices of the whole.
    """
    assert attention_mask is None and segments is not None, "flat attention needs segments and no mask"
    assert softcap is None and s_aux is None, (
        f"{type(module).__name__}: soft caps and sinks need the padded layout"
    )
    sequence = segments.sequence
    if sequence:
        query, key, value = sequence.spread_heads(query, key, value)
    output = attend(query, key, value, segments, scaling, sliding_window, dropout)
    return (sequence.spread_tokens(output) if sequence else output).transpose(1, 2), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
) -> Tensor:
    """[1, H, T, D] by the fastest kernel that is exact here."""
    if HAS_VARLEN and query.is_cuda and dropout == 0 and query.element_size() == 2:
        longest, left = max(segments.lengths), -1 if sliding_window is None else sliding_window - 1
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
        shape = (segments.bounds, segments.bounds, longest, longest)
        output = varlen_attn(q, k, v, *shape, scale=scaling, window_size=(left, 0), **VARLEN_GROUPS)
        return output.unsqueeze(0).transpose(1, 2)
    return segmented_sdpa(query, key, value, segments.lengths, scaling, sliding_window, dropout)


AttentionInterface.register(FLAT_ATTENTION, flat_attention)


def compile_layers(model: PreTrainedModel, backend: str) -> None:
    """Compiles every decoder layer in place, but for attention: its kernels are what they should be.

    Layers share one compiled graph, so that start-up does not grow with depth. A second length of batches
    compiles again, for any length. The rest of the model runs as it is.
    """
    AttentionInterface.register(FLAT_ATTENTION, torch.compiler.disable(flat_attention))
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            module.compile(backend=backend)
