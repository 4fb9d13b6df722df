"""Micro-batches through megatron-core's schedules: its arguments, its output layer, its loss.

The scale rule here: megatron-core sums gradients over micro-batches and data ranks, then divides them by the
tokens that all ranks have reported. The loss is therefore multiplied by as many tokens, and every rank
reports its own.
Shapes: T = tokens of a batch, t = those of this rank, N = those of t whose logits are needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from swift.batch import IGNORED, Batch
from swift.engines.megatron.context import ContextRanks
from swift.engines.megatron.layers import FlatTokens, flat_tokens
from swift.engines.megatron.logits import ShardedLogits
from swift.engines.megatron.settings import Settings
from swift.engines.megatron.teacher import Rows, ShardedTeacher
from swift.objectives.distill import ToldTeacher
from swift.objectives.logits import widen
from swift.objectives.types import HEADS, LossSum, Objective, TokenStats


@dataclass(frozen=True)
class Laid:
    """A batch as this rank's model takes it."""

    ids_t: Tensor
    labels_t: Tensor
    wanted_t: Tensor  # bool: whose outputs are needed
    kept_N: Tensor  # their places; that of the first token where there is none
    flat: FlatTokens


@dataclass(frozen=True)
class Form:
    """How batches are laid out for these settings, and what comes back."""

    settings: Settings
    vocabulary: int
    device: torch.device
    context: ContextRanks
    temperature: float = 1.0  # logits are divided by it
    verdict: tuple[int, int] | None = None  # tokens whose logits make up scores: yes and no

    def lay_out(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Laid:
        """Values on the host decide all shapes, so nothing here waits for the device."""
        # Tensor ranks may each take a part of the tokens of this one.
        multiple = self.settings.tensor_model_parallel_size if self.settings.sequence_parallel else 1
        whole = self.context.pad(batch, multiple)
        wanted_T = whole.trained
        if needs & HEADS:  # which look at the last token of each segment
            ends_S = batch.segment_lengths().cumsum(0) - 1
            wanted_T = torch.zeros_like(wanted_T).index_fill(0, ends_S, True)
        ids_t, labels_t, wanted_t = map(self.context.own, (whole.input_ids, whole.labels, wanted_T))
        kept_N = wanted_t.nonzero().squeeze(1)
        if not kept_N.numel():  # an output layer without rows has no gradient that ranks could exchange
            kept_N = torch.zeros(1, dtype=torch.int64)
        flat = flat_tokens(whole, self.context, self.device)
        return Laid(*(x.to(self.device) for x in (ids_t, labels_t, wanted_t, kept_N)), flat)

    def stats(
        self, logits: Tensor, laid: Laid, batch: Batch, needs: frozenset[str], taught: Rows | None = None
    ) -> TokenStats:
        """`logits` [1, N, v] of the last stage -> stats of the whole batch, on every rank of it.

        `taught`: what a teacher beside the model says there, where there is one.
        """
        view = ShardedLogits.cut(logits[0], laid.kept_N, self.vocabulary, self.temperature)
        if needs & HEADS and self.verdict:
            ids_N2 = laid.kept_N.new_tensor(self.verdict).expand(len(laid.kept_N), 2)
            yes_N, no_N = view.pick(ids_N2).unbind(1)
            return self._pool((yes_N - no_N)[:, None], laid, batch)
        if needs & HEADS:
            return self._pool(logits[0], laid, batch)

        def spread(values_t: Tensor) -> Tensor:
            if laid.kept_N.numel() == 1:  # which may be there for its gradient alone
                values_t = values_t * laid.wanted_t
            return self.context.gather(values_t)[: batch.num_tokens]

        def own(values_T: Tensor) -> Tensor:
            missing = laid.labels_t.numel() * self.context.size - batch.num_tokens
            return self.context.own(F.pad(values_T, (0, missing))).to(self.device)

        if "values" in needs:  # of a head with one output
            return TokenStats(values=spread(view.place(widen(logits[0, :, 0]), laid.labels_t)))
        found: dict[str, Any] = {
            n: spread(getattr(view, n)(laid.labels_t)) for n in sorted(needs - {"teacher"})
        }

        def place(values_N: Tensor) -> Tensor:
            return spread(view.place(values_N, laid.labels_t))

        if "teacher" in needs:
            found["teacher"] = (
                ShardedTeacher(view, taught, place)
                if taught
                else ToldTeacher.of(batch, view, own=own, spread=place)
            )
        return TokenStats(**found)

    def _pool(self, output_NC: Tensor, laid: Laid, batch: Batch) -> TokenStats:
        """What comes out at the last token of each segment, which one of the ranks of the batch has."""
        count = batch.num_segments
        at_N = laid.flat.segment_ids[laid.kept_N].clamp(max=count)  # beyond it is what pads the batch
        values_NC = widen(output_NC) * laid.wanted_t[laid.kept_N, None]
        found_SC = values_NC.new_zeros(count + 1, values_NC.shape[1]).index_add(0, at_N, values_NC)[:count]
        if self.context.size > 1:
            found_SC = reduce_from_tensor_model_parallel_region(found_SC, self.context.group)
        if self.settings.head == 0:
            return TokenStats(embeddings=found_SC)
        return TokenStats(scores=found_SC[:, 0], class_logits=found_SC)


class KeptRows:
    """Lets the output layer see only the tokens whose logits are needed: prompts never become logits."""

    def __init__(self, layer: nn.Module) -> None:
        self.rows_N: Tensor | None = None
        self.withholds = False  # a teacher's: one row becomes logits, and what enters the layer is kept
        self.entered: Tensor | None = None
        # Rows are chosen among the tokens of all tensor ranks, which are therefore gathered beforehand.
        self.gathers = layer.sequence_parallel
        if self.gathers:
            layer.sequence_parallel, layer.allreduce_dgrad = False, True
        layer.register_forward_pre_hook(self._keep)

    def _keep(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        if self.gathers:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden if self.rows_N is None else hidden[self.rows_N]
        if self.withholds:
            self.entered, hidden = hidden, hidden[:1]
        return (hidden, *inputs[1:])


Consume = Callable[[TokenStats, Batch, Laid], Any]
Taught = tuple[Batch, Rows | None]  # with what a teacher beside the model says there


def run_batches(
    chunks: Sequence[nn.Module], batches: Sequence[Taught], step: Callable[..., Any], *, train: bool
) -> list[Any]:
    """What the function that `step` gives out made of each batch; on the last stage, empty elsewhere."""
    iterators = [iter(batches) for _ in chunks]
    return list(
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=batches[0][0].num_tokens,
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )
    )


@dataclass(frozen=True)
class Schedule:
    """Runs micro-batches through the chunks of this rank, together with the other stages."""

    form: Form

    def _step(
        self, consume: Consume, needs: frozenset[str], batches: Any, model: nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        """One micro-batch through one chunk, as megatron-core calls it."""
        batch, taught = next(batches)
        laid = self.form.lay_out(batch, needs)
        if get_attr_wrapped_model(model, "post_process"):
            get_attr_wrapped_model(model, "kept").rows_N = laid.kept_N
        output = model(laid.ids_t[None], None, None, packed_seq_params=laid.flat)

        def finish(logits: Tensor, non_loss_data: bool = False) -> Any:  # noqa: ARG001 - megatron's argument
            return consume(self.form.stats(logits, laid, batch, needs, taught), batch, laid)

        return output, finish

    def forward(
        self, chunks: Sequence[nn.Module], batches: Sequence[Taught], needs: frozenset[str], consume: Consume
    ) -> list[Any]:
        """What `consume` makes of the stats of each batch, without gradients."""
        if not batches:  # as many on all ranks
            return []
        with torch.no_grad():
            return run_batches(chunks, batches, partial(self._step, consume, needs), train=False)

    def forward_backward(
        self,
        chunks: Sequence[nn.Module],
        batches: Sequence[Taught],
        objective: Objective,
        units: dict[str, float],
        tokens: int,
    ) -> list[LossSum]:
        """Gradients of all micro-batches. `units` and trained `tokens`: of the whole step, on all ranks."""

        def lose(stats: TokenStats, batch: Batch, laid: Laid) -> tuple[Tensor, Tensor, LossSum]:
            result = objective(stats, batch.to(self.form.device))
            loss = sum(term / max(units[unit], 1) for unit, term in result.terms.items())
            reported = (laid.labels_t != IGNORED).sum().int()
            kept = LossSum({unit: term.detach() for unit, term in result.terms.items()}, result.metrics)
            return loss * max(tokens, 1), reported, kept

        return run_batches(chunks, batches, partial(self._step, lose, objective.needs), train=True)
