"""Batch -> model arguments -> DenseLogits -> TokenStats. The choice of layout lives here, and only here.

Flat: one row of T tokens, segments kept apart by the attention. Padded: [B, L] with padding on the right, for
models whose attention cannot be replaced. Both give the same stats.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import ModelOutput

from swift.batch import IGNORED, Batch
from swift.config.option import ConfigError
from swift.engines.attention import PLAIN_LAYERS, Segments
from swift.engines.sequence_parallel import ALONE, SequenceRanks
from swift.engines.transformers.teacher import run_teacher
from swift.objectives.distill import LocalTeacher, ToldTeacher
from swift.objectives.logits import DenseLogits, widen
from swift.objectives.types import HEADS, TokenStats

NOT_OF_LOGITS = frozenset({"router_logits", "teacher"})
NEEDS_OWN_ATTENTION = ("attn_logit_softcapping", "linear_conv_kernel_dim", "mamba_d_state")


def refusal_of_flat(model: nn.Module | type[nn.Module], config: PretrainedConfig) -> str | None:
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


def check_sequence_parallel(config: PretrainedConfig, size: int) -> None:
    """Raises ConfigError where --sequence_parallel_size cannot be exact for a model."""
    if size == 1:
        return
    text = config.get_text_config()
    heads = text.num_attention_heads
    if heads % size:
        raise ConfigError(
            f"--sequence_parallel_size {size} does not divide the model's {heads} attention heads",
            hint="each process takes as many heads: choose a divisor",
        )
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    refusal = refusal_of_flat(architecture, config)
    if refusal:
        raise ConfigError(
            f"--sequence_parallel_size {size}: {type(config).__name__} needs padding, because {refusal}",
            hint="leave --sequence_parallel_size out",
        )


def check_answering(architecture: type[nn.Module], config: PretrainedConfig) -> None:
    """Raises ConfigError where a model cannot give answers between two steps of its training."""
    refusal = refusal_of_flat(architecture, config)
    if refusal:
        raise ConfigError(
            f"{architecture.__name__} cannot answer while it is trained, because {refusal}",
            hint="--use_vllm true answers with vLLM",
        )


@dataclass(frozen=True)
class Layout:
    """How a model takes its batches. `own_attention`: the flat kernel is ours, not one of transformers."""

    flat: bool
    own_attention: bool
    device: torch.device
    sequence: SequenceRanks = ALONE  # ranks that share a batch
    temperature: float = 1.0  # logits are divided by it
    verdict: tuple[int, int] | None = None  # tokens whose logits make up scores: yes and no


def flat_arguments(batch: Batch, layout: Layout) -> dict[str, Any]:
    """Model arguments of one flat row; `segments` travel through the model to our attention function.

    The kernels of transformers keep segments apart by themselves, wherever position ids start again at 0.
    """
    device, sequence = layout.device, layout.sequence
    arguments: dict[str, Any] = {
        "input_ids": sequence.own(batch.input_ids[None]).to(device),
        "position_ids": sequence.own(batch.positions()[None]).to(device),
    }
    if layout.own_attention:
        arguments["segments"] = Segments.of(batch.segment_lengths().tolist(), device, sequence=sequence)
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


def find_head(model: nn.Module, name: str) -> nn.Module:
    """The layer called `name`, however deep it is wrapped."""
    return next(module for path, module in model.named_modules() if path.rpartition(".")[2] == name)


def score_segments(model: nn.Module, batch: Batch, needs: frozenset[str], layout: Layout) -> TokenStats:
    """What the model says at the last token of each segment: the output of its head, or what enters it."""
    last_S = batch.segment_lengths().cumsum(0) - 1
    is_language_model = "embeddings" in needs or layout.verdict is not None
    head = find_head(model, "lm_head" if is_language_model else "score")
    arguments, index_T = lay_out(batch, layout)
    last_S = (last_S if index_T is None else index_T[last_S]).to(layout.device)
    if is_language_model and layout.flat:  # whose head would make logits of every token
        arguments["logits_to_keep"], last_S = last_S, torch.arange(batch.num_segments, device=layout.device)
    with watched(head) as calls:
        model(**arguments, use_cache=False)
    entered, said = (x.flatten(0, 1)[last_S] for x in calls[0])
    if "embeddings" in needs:
        return TokenStats(embeddings=widen(entered))
    if layout.verdict:
        yes_S, no_S = (widen(said[:, token]) for token in layout.verdict)
        return TokenStats(scores=yes_S - no_S)
    return TokenStats(scores=widen(said)[:, 0], class_logits=widen(said))


def score_tokens(model: nn.Module, batch: Batch, layout: Layout) -> TokenStats:
    """The first output of the model's head at every trained token."""
    arguments, index_T = lay_out(layout.sequence.pad(batch), layout)
    with watched(find_head(model, "score")) as calls:
        model(**arguments, use_cache=False)
    values_t = widen(calls[0][1].flatten(0, 1)[:, 0])
    if index_T is not None:
        values_t = values_t[index_T.to(layout.device)]
    values_T = layout.sequence.gather(values_t)[: batch.num_tokens]
    return TokenStats(values=values_T * batch.trained.to(layout.device))


def lay_out(batch: Batch, layout: Layout) -> tuple[dict[str, Any], Tensor | None]:
    """Model arguments, and the place of each token in the padded layout."""
    return (flat_arguments(batch, layout), None) if layout.flat else padded_arguments(batch, layout.device)


def score(
    model: nn.Module,
    batch: Batch,
    needs: frozenset[str],
    layout: Layout,
    teacher: PreTrainedModel | None = None,
) -> TokenStats:
    """Runs the model once and fills the stats in `needs`, each [T] or [S, ...] on the layout's device.

    `batch` is on the host: shapes that depend on its values are worked out there, without waiting for a GPU.
    `teacher`: another model that is run on the batch too, where it is needed and the batch does not hold it.
    """
    if needs & HEADS:
        return score_segments(model, batch, needs, layout)
    if "values" in needs:
        return score_tokens(model, batch, layout)
    device, sequence = layout.device, layout.sequence
    whole = sequence.pad(batch)
    labels_t = sequence.own(whole.labels)
    trained_N = (labels_t != IGNORED).nonzero().squeeze(1)
    positions_N = trained_N.to(device)
    routing = {"output_router_logits": True} if "router_logits" in needs else {}
    arguments, index_T = lay_out(whole, layout)
    rows_N = positions_N if index_T is None else index_T[trained_N].to(device)
    taught = run_teacher(teacher, arguments, rows_N) if teacher is not None else None
    if layout.flat:
        output = model(**arguments, **routing, logits_to_keep=positions_N, use_cache=False)
        logits_NV = output.logits[0]
    else:
        output = model(**arguments, **routing, use_cache=False)
        logits_NV = output.logits.flatten(0, 1)[rows_N]
    view = DenseLogits(logits_NV, positions_N, layout.temperature)
    labels_t = labels_t.to(device)

    def spread(values_t: Tensor) -> Tensor:
        return sequence.gather(values_t)[: batch.num_tokens]

    def place(values_N: Tensor) -> Tensor:
        return spread(view.place(values_N, labels_t))

    def own(values_T: Tensor) -> Tensor:
        return sequence.own(F.pad(values_T, (0, whole.num_tokens - batch.num_tokens))).to(device)

    found: dict[str, Any] = {
        name: spread(getattr(view, name)(labels_t)) for name in sorted(needs - NOT_OF_LOGITS)
    }
    if "teacher" in needs:
        found["teacher"] = (
            LocalTeacher(view, taught, place)
            if taught
            else ToldTeacher.of(batch, view, own=own, spread=place)
        )
    return TokenStats(**found, router_logits=router_logits(output, index_T) if routing else None)


def router_logits(output: ModelOutput, index_T: Tensor | None) -> tuple[Tensor, ...]:
    """[T, experts] of every layer, from a flat output or, with the tokens' places, from a padded one."""
    layers = (layer.flatten(0, -2) for layer in output.router_logits)
    return tuple(layer if index_T is None else layer[index_T.to(layer.device)] for layer in layers)
