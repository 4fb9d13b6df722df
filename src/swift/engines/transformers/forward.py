"""Batch -> model arguments -> LogitsView -> TokenStats. The choice of layout lives here, and only here.

Flat: one row of T tokens, segments kept apart by the attention. Padded: [B, L] with padding on the right, for
models whose attention cannot be replaced. Both give the same stats.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from swift.batch import Batch
from swift.objectives.logits import DenseLogits
from swift.objectives.types import TokenStats

PLAIN_LAYERS = {"full_attention", "sliding_attention"}
HEADS = frozenset({"scores", "class_logits", "embeddings"})
NEEDS_OWN_ATTENTION = ("attn_logit_softcapping", "linear_conv_kernel_dim", "mamba_d_state")


def refusal_of_flat(model: nn.Module, config: PretrainedConfig) -> str | None:
    """Why this model needs padding, None when flat batches are exact for it."""
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    strange = set(getattr(config, "layer_types", None) or ()) - PLAIN_LAYERS
    if strange:
        return f"it has layers of type {', '.join(sorted(strange))}"
    for name in NEEDS_OWN_ATTENTION:
        if getattr(config, name, None):
            return f"its config sets {name}"
    return None


def flat_arguments(batch: Batch, device: torch.device, *, own_attention: bool) -> dict[str, object]:
    """Model arguments of one flat row; `segment_*` travel through the model to our attention function.

    The kernels of transformers keep segments apart by themselves, wherever position ids start again at 0.
    """
    arguments: dict[str, object] = {
        "input_ids": batch.input_ids[None].to(device),
        "position_ids": batch.positions()[None].to(device),
    }
    if own_attention:
        lengths = batch.segment_lengths()
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        arguments |= {"segment_lengths": lengths.tolist(), "segment_bounds": bounds.to(device)}
    return arguments


def padded_arguments(batch: Batch, device: torch.device) -> tuple[dict[str, object], Tensor]:
    """Arguments of a [B, L] batch padded on the right, and [T]: where each flat token stands in [B * L]."""
    longest = int(batch.segment_lengths().max())
    index_T = batch.segment_ids * longest + batch.positions()
    shape = (batch.num_segments, longest)
    ids = batch.input_ids.new_zeros(shape).flatten().index_copy(0, index_T, batch.input_ids).view(shape)
    mask = torch.zeros_like(ids).flatten().index_fill(0, index_T, 1).view(shape)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, index_T


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of `module` whenever the model calls it.

    Models pool before they return, and know nothing of segments; a part of one cannot be called by itself,
    because DDP and FSDP watch the whole.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0], output)))
    try:
        yield calls
    finally:
        handle.remove()


def score_segments(
    model: nn.Module,
    batch: Batch,
    needs: frozenset[str],
    *,
    flat: bool,
    own_attention: bool,
    device: torch.device,
) -> TokenStats:
    """What the model says at the last token of each segment: the output of its head, or what enters it."""
    last_S = batch.segment_lengths().cumsum(0) - 1
    name = "lm_head" if "embeddings" in needs else "score"
    head = next(module for path, module in model.named_modules() if path.rpartition(".")[2] == name)
    if flat:
        arguments = flat_arguments(batch, device, own_attention=own_attention)
    else:
        arguments, index_T = padded_arguments(batch, device)
        last_S = index_T[last_S]
    with watched(head) as calls:
        model(**arguments, use_cache=False)
    entered, said = (x.flatten(0, 1)[last_S.to(device)] for x in calls[0])
    if "embeddings" in needs:
        return TokenStats(embeddings=widen(entered))
    return TokenStats(scores=widen(said)[:, 0], class_logits=widen(said))


def widen(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


def score(
    model: nn.Module,
    batch: Batch,
    needs: frozenset[str],
    *,
    flat: bool,
    own_attention: bool,
    device: torch.device,
) -> TokenStats:
    """Runs the model once and fills the stats in `needs`, each [T] on `device`.

    `batch` is on the host: shapes that depend on its values are worked out there, without waiting for a GPU.
    `own_attention`: the flat kernel is ours, not one of transformers.
    """
    if needs & HEADS:
        return score_segments(model, batch, needs, flat=flat, own_attention=own_attention, device=device)
    trained_N = batch.trained.nonzero().squeeze(1)
    positions_N = trained_N.to(device)
    routing = {"output_router_logits": True} if "router_logits" in needs else {}
    index_T = None  # the place of each token in the padded layout
    if flat:
        arguments = flat_arguments(batch, device, own_attention=own_attention)
        output = model(**arguments, **routing, logits_to_keep=positions_N, use_cache=False)
        logits_NV = output.logits[0]
    else:
        arguments, index_T = padded_arguments(batch, device)
        output = model(**arguments, **routing, use_cache=False)
        logits_NV = output.logits.flatten(0, 1)[index_T[trained_N].to(device)]
    view = DenseLogits(logits_NV, positions_N)
    labels_T = batch.labels.to(device)
    return TokenStats(
        logps=view.logps(labels_T) if "logps" in needs else None,
        correct=view.correct(labels_T) if "correct" in needs else None,
        logits_mean=view.mean(batch.num_tokens) if "logits_mean" in needs else None,
        mean_logps=view.mean_logps(batch.num_tokens) if "mean_logps" in needs else None,
        router_logits=router_logits(output, index_T) if routing else None,
    )


def router_logits(output: ModelOutput, index_T: Tensor | None) -> tuple[Tensor, ...]:
    """[T, experts] of every layer, from a flat output or, with the tokens' places, from a padded one."""
    layers = (layer.flatten(0, -2) for layer in output.router_logits)
    return tuple(layer if index_T is None else layer[index_T.to(layer.device)] for layer in layers)
