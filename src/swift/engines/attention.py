"""Attention over flat tokens, registered with transformers: segments never see each other, no mask is built.

Shapes: T = flat tokens, H = query heads, K = key-value heads, D = head width.
Not here: the choice between this and padding (forward.py).
"""

import inspect
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from swift.engines.sequence_parallel import ALONE, SequenceRanks

try:  # torch's own variable-length flash kernel, the fast path on a GPU
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

FLAT_ATTENTION = "swift_flat"
PLAIN_LAYERS = {"full_attention", "sliding_attention"}  # of transformers; what this can do
VARLEN_PARAMETERS = set(inspect.signature(varlen_attn).parameters) if varlen_attn else set()
LONG_SEGMENT = 2048  # tokens
HAS_VARLEN = "window_size" in VARLEN_PARAMETERS  # 2.10 has another signature
VARLEN_GROUPS = {"enable_gqa": True} if "enable_gqa" in VARLEN_PARAMETERS else {}  # 2.11 groups heads unasked


@dataclass(frozen=True, eq=False, slots=True)
class Heads:
    """What a layer compares, and how."""

    query: Tensor  # [1, H, T, D]
    key: Tensor  # [1, K, T, D]
    value: Tensor  # [1, K, T, D]
    scaling: float | None
    window: int | None  # tokens that each one sees, with itself; none = all before it
    dropout: float


class Attending(Protocol):
    """What attention has to know of a flat row: one object, which compiled layers hand on unseen."""

    def attend(self, module: nn.Module, heads: Heads) -> Tensor:
        """[1, H, T, D]; `module` is the layer's own."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    """Segments of a training batch, which never see each other."""

    lengths: list[int]
    bounds: Tensor  # int32 [S + 1], cumulative
    sequence: SequenceRanks = ALONE  # ranks that share the batch; the segments are of the whole
    keys: "Segments | None" = None  # of keys and values, where queries are only the last tokens of each

    @classmethod
    def of(
        cls,
        lengths: list[int],
        device: torch.device,
        *,
        sequence: SequenceRanks = ALONE,
        keys: "Segments | None" = None,
    ) -> "Segments":
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(lengths, bounds.to(device, non_blocking=True), sequence, keys)

    def attend(self, _module: nn.Module, heads: Heads) -> Tensor:
        """As Attending; where T is spread over ranks, the tensors are slices of the whole."""
        if self.sequence.size == 1:
            return attend(heads, self)
        query, key, value = self.sequence.spread_heads(heads.query, heads.key, heads.value)
        return self.sequence.spread_tokens(attend(replace(heads, query=query, key=key, value=value), self))


def window_mask(length: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[L, keys] bool: token i sees the last `window` tokens up to itself. The last token is the last key."""
    distance = torch.arange(keys - length, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


def segmented_sdpa(heads: Heads, lengths: list[int], key_lengths: list[int]) -> Tensor:
    """[1, H, T, D] causal attention, one SDPA call a segment: exact, linear in the number of segments."""
    outputs, window = [], heads.window
    options = {"scale": heads.scaling, "dropout_p": heads.dropout, "enable_gqa": True}
    queries = heads.query.split(lengths, dim=2)
    keys, values = (t.split(key_lengths, dim=2) for t in (heads.key, heads.value))
    for q, k, v in zip(queries, keys, values, strict=True):
        length, seen = q.shape[2], k.shape[2]
        masked = length < seen or (window and window < seen)
        mask = window_mask(length, seen, window or seen, q.device) if masked else None
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
    segments: Attending | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D].

    `segments` arrive through the model and know who sees whom.
    """
    assert attention_mask is None and segments is not None, "flat attention needs segments and no mask"
    assert softcap is None and s_aux is None, (
        f"{type(module).__name__}: soft caps and sinks need the padded layout"
    )
    output = segments.attend(module, Heads(query, key, value, scaling, sliding_window, dropout))
    return output.transpose(1, 2), None


def prefers_loop(segments: Segments, window: int | None) -> bool:
    """Whether calls for one segment each are faster on a GPU than one for all of them.

    The former take cuDNN's kernel on a Hopper, the latter is flash 2. Forward and backward of 8192 tokens, 32
    heads and 8 for keys, on an H100: 4.0 against 6.8 ms for 1 segment, 1.9 against 2.4 for 4, 1.7 against 1.6
    for 8 and 2.1 against 1.2 for 16. Shorter windows and keys of their own would need masks.
    """
    lengths = segments.lengths
    masked = segments.keys is not None or (window is not None and window < max(lengths))
    return not masked and sum(lengths) >= LONG_SEGMENT * len(lengths)


def attend(heads: Heads, segments: Segments) -> Tensor:
    """[1, H, T, D] by the fastest kernel that is exact here."""
    keys, query = segments.keys or segments, heads.query
    suits_varlen = HAS_VARLEN and query.is_cuda and heads.dropout == 0 and query.element_size() == 2
    if suits_varlen and not prefers_loop(segments, heads.window):
        left = -1 if heads.window is None else heads.window - 1
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, heads.key, heads.value))
        shape = (segments.bounds, keys.bounds, max(segments.lengths), max(keys.lengths))
        output = varlen_attn(q, k, v, *shape, scale=heads.scaling, window_size=(left, 0), **VARLEN_GROUPS)
        return output.unsqueeze(0).transpose(1, 2)
    return segmented_sdpa(heads, segments.lengths, keys.lengths)


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
