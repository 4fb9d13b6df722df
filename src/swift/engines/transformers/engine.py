"""The engine over a transformers model.

Owns: the micro-batch loop, the scaling rule, clipping, the step.
Not here: layouts (forward.py), processes (wrap.py), files (checkpoint.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging import version
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from swift.batch import Batch
from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.config.parallel import ParallelConfig
from swift.engines.attention import FLAT_ATTENTION, compile_layers
from swift.engines.offload import activations_on_cpu, set_aside
from swift.engines.optim import answering, begin_training, build_optimizer, build_scheduler
from swift.engines.protocol import Snapshot, StepInfo, Sums
from swift.engines.ranks import Ranks
from swift.engines.sequence_parallel import SequenceRanks
from swift.engines.stepping import NOTHING, add_units, collect_sums, gather_rows
from swift.engines.transformers import checkpoint
from swift.engines.transformers.forward import (
    Layout,
    check_answering,
    flat_arguments,
    refusal_of_flat,
    score,
)
from swift.engines.transformers.noise import EmbeddingNoise
from swift.engines.transformers.weights import stream_weights
from swift.engines.transformers.wrap import Wrapper, shard, wrap
from swift.models.adapters import leave_casting_to_autocast
from swift.models.load import HALF
from swift.objectives.types import LossSum, Objective, TokenStats

RENAMED_IN = version.parse("5.23")  # of transformers: gradient checkpointing became activation checkpointing

DEFAULT_WRAPPER = partial(wrap, parallel=ParallelConfig())  # one process, or DDP


class TransformersEngine:
    """One model, one optimizer, on one process or several. Implements `swift.engines.protocol.Engine`."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        config: OptimConfig,
        *,
        learning_rate: float,
        total_steps: int,
        flat: bool | None = None,
        own_attention: bool = True,
        gradient_checkpointing: bool = False,
        activation_cpu_offload: bool = False,
        compiler: str | None = None,
        compute: torch.dtype | None = None,
        ranks: Ranks | None = None,
        noise_alpha: float | None = None,
        wrapper: Wrapper = DEFAULT_WRAPPER,
        resume_from: Path | None = None,
        frozen: PreTrainedModel | None = None,
        frozen_moves: bool = False,
        temperature: float = 1.0,
        verdict: tuple[int, int] | None = None,
    ) -> None:
        """`compute`: dtype of the arithmetic; None = that of the weights. `compiler`: of the layers.

        `frozen`: the reference of full-parameter training; with adapters it is the model without them. One
        that is mixed with the model (`frozen_moves`) is part of checkpoints. For objectives that need a
        teacher it is that. `temperature`: what all logits are divided by. `verdict`: the tokens for yes and
        no whose logits are the scores of a language model.
        """
        self.model = model
        self.ranks = ranks or Ranks()
        self.data_rank, self.data_world = self.ranks.data_rank, self.ranks.data_world
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.device = next(model.parameters()).device
        self.dtype = base.dtype
        self.compute = compute or self.dtype
        if self.compute in HALF:  # see _score
            leave_casting_to_autocast(model)
        self.offload = activation_cpu_offload
        size = self.ranks.sequence_size
        self.flat = choose_layout(base, flat) and (frozen is None or choose_layout(frozen, flat))
        sequence = SequenceRanks(self.ranks.rank % size, size, self.ranks.sequence_group)
        own = self.flat and own_attention
        self.layout = Layout(self.flat, own, self.device, sequence, temperature, verdict)
        if self.layout.own_attention:
            base.set_attn_implementation(FLAT_ATTENTION)
        assert self.layout.own_attention or size == 1, "only our own attention knows how to exchange heads"
        if gradient_checkpointing:
            enable_recompute(base)
        if compiler:
            compile_layers(base, compiler)
        if self.compute == torch.float16:
            widen_trained(model)  # before weights are read: those of a checkpoint are as wide
        if resume_from:
            checkpoint.load_weights(model, resume_from)
        self.noise = EmbeddingNoise(base.get_input_embeddings(), noise_alpha) if noise_alpha else None
        self.max_grad_norm = config.max_grad_norm
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.num_parameters = (trained, sum(p.numel() for p in model.parameters()))  # slices would not tell
        schedules: list[Any] = []  # that of a plugin's optimizer comes with it

        def build() -> Optimizer:
            optimizer, scheduler = build_optimizer(model, config, learning_rate)
            schedules.append(scheduler)
            return optimizer

        self.wrapped = wrapper(model, base, ranks=self.ranks, compute=self.compute, build_optimizer=build)
        self.module = self.wrapped.module  # what is called: the model, or inside `reference` the frozen one
        self.frozen = None if frozen is None else self._freeze(frozen)
        self.frozen_moves = frozen_moves
        self.scheduler = schedules[0] or build_scheduler(self.wrapped.optimizer, config, total_steps)
        if resume_from:
            checkpoint.load_state(model, self.wrapped, self.scheduler, resume_from, ranks=self.ranks)
        begin_training(self.wrapped.optimizer)

    def _freeze(self, model: PreTrainedModel) -> PreTrainedModel:
        """The reference as it runs beside the model: sliced where that one is, else whole."""
        model.requires_grad_(False).eval()
        if self.layout.own_attention:
            model.set_attn_implementation(FLAT_ATTENTION)
        if any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            shard(model, model, self.ranks, self.compute)
        return model

    def _score(self, batch: Batch, needs: frozenset[str]) -> TokenStats:
        if self.noise:
            self.noise.batch = batch
        # Weights in float32 beside half-precision arithmetic (adapters, or all of them): autocast runs both.
        with (
            activations_on_cpu(self.offload),
            torch.autocast(self.device.type, self.compute, enabled=self.compute in HALF),
        ):
            teacher = self.frozen if "teacher" in needs else None
            return score(self.module, batch, needs, self.layout, teacher)

    def _even_out(
        self, batches: Sequence[Batch], objective: Objective
    ) -> tuple[list[Batch], list[dict[str, int]], dict[str, float]]:
        """As many micro-batches on every rank, the units of each, and those of the whole step.

        Ranks with fewer rows than others run batches without a trained token: the exchanges inside the model
        and its backward need all of them.
        """
        units, nothing = [objective.units(b) for b in batches], objective.units(NOTHING)
        totals = add_units([*units, nothing])
        counts = self.ranks.gather([len(batches), *(totals[unit] for unit in sorted(totals))])
        longest = int(max(row[0] for row in counts))
        sums = [sum(column) for column in list(zip(*counts, strict=True))[1:]]
        missing = longest - len(batches)
        step_units = dict(zip(sorted(totals), sums, strict=True))
        return [*batches, *[NOTHING] * missing], [*units, *[nothing] * missing], step_units

    def forward(self, batches: Sequence[Batch], needs: frozenset[str]) -> list[TokenStats]:
        self.model.eval()
        longest = int(max(row[0] for row in self.ranks.gather([len(batches)])))
        with torch.no_grad(), answering(self.wrapped.optimizer):
            stats = [self._score(b, needs) for b in (*batches, *[NOTHING] * (longest - len(batches)))]
        return stats[: len(batches)]

    def forward_backward(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        self.model.train()
        batches, units, step_units = self._even_out(batches, objective)
        results = []
        for i, batch in enumerate(batches, start=1):
            with self.wrapped.gradients(is_last=i == len(batches)):
                result = objective(self._score(batch, objective.needs), batch.to(self.device))
                # The scale rule: L = sum of terms / units of the whole step. `wrapped` undoes means.
                loss = sum(term / max(step_units[unit], 1) for unit, term in result.terms.items())
                self.wrapped.backward(loss)
            results.append(result)
        return self._collect(results, batches, units)

    def measure(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        self.model.eval()
        batches, units, _ = self._even_out(batches, objective)
        with torch.no_grad(), answering(self.wrapped.optimizer):
            results = [objective(self._score(b, objective.needs), b.to(self.device)) for b in batches]
        return self._collect(results, batches, units)

    def _collect(
        self, results: Sequence[LossSum], batches: Sequence[Batch], units: Sequence[dict[str, int]]
    ) -> Sums:
        """Sums over all micro-batches and ranks: fetched from the device at once, exchanged at once."""
        local = collect_sums(results, units)
        local.add("tokens", sum(b.num_tokens for b in batches if b is not NOTHING), 0)
        names = sorted(local.pairs)
        total = Sums()
        for numbers in self.ranks.gather([number for name in names for number in local.pairs[name]]):
            pairs = zip(numbers[0::2], numbers[1::2], strict=True)
            total.merge(Sums(dict(zip(names, pairs, strict=True))))
        return total

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        return gather_rows(values, self.ranks)

    def optim_step(self) -> StepInfo:
        learning_rate = self.scheduler.get_last_lr()[0]
        grad_norm, applied = self.wrapped.step(self.max_grad_norm)
        if applied:
            self.scheduler.step()
        return StepInfo(grad_norm, learning_rate, applied)

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.frozen is None:
            assert isinstance(self.model, PeftModel), "full training has a frozen copy"
            with self.model.disable_adapter():
                yield
            return
        trained, self.module = self.module, self.frozen
        try:
            yield
        finally:
            self.module = trained

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        check_answering(type(base), base.config)
        attention = base.config._attn_implementation
        base.set_attn_implementation(FLAT_ATTENTION)
        self.model.eval()

        def run() -> object:
            return self.model(**flat_arguments(NOTHING, Layout(True, True, self.device)), use_cache=False)

        try:
            with (
                torch.no_grad(),
                answering(self.wrapped.optimizer),
                torch.autocast(self.device.type, self.compute, enabled=self.compute in HALF),
                self.wrapped.whole(self.model, run),
            ):
                yield self.model
        finally:
            base.set_attn_implementation(attention)

    def set_aside(self, *, weights: bool, moments: bool) -> AbstractContextManager[None]:
        tensors: list[Tensor] = []
        if weights:
            tensors += [*self.model.parameters(), *(self.frozen.parameters() if self.frozen else ())]
        if moments:
            states = self.wrapped.optimizer.state.values()
            tensors += [x for state in states for x in state.values() if torch.is_tensor(x) and x.is_cuda]
        return set_aside(tensors if self.device.type == "cuda" else ())

    def mix_reference(self, share: float) -> None:
        assert self.frozen is not None
        with torch.no_grad(), answering(self.wrapped.optimizer):
            weights = checkpoint.unique_weights(self.model)
            for name, kept in checkpoint.unique_weights(self.frozen).items():
                kept.copy_(torch.lerp(kept.float(), weights[name].float(), share))

    def drop_reference(self) -> None:
        self.frozen = None
        torch.cuda.empty_cache()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        with answering(self.wrapped.optimizer):
            yield from stream_weights(self.model, self.wrapped)

    def save(self, path: Path, *, resumable: bool) -> Snapshot:
        parts = (self.model, self.wrapped, self.scheduler, path)
        kept = self.frozen if self.frozen_moves else None
        return checkpoint.take_snapshot(*parts, ranks=self.ranks, resumable=resumable, reference=kept)


def widen_trained(model: nn.Module) -> None:
    """float16 weights that are trained become float32: float16 cannot tell their updates apart."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()


def enable_recompute(model: PreTrainedModel) -> None:
    """Activations are computed again in the backward pass instead of being kept."""
    options = {"use_reentrant": False}
    if version.parse(transformers.__version__) >= RENAMED_IN:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def choose_layout(base: PreTrainedModel, flat: bool | None) -> bool:
    """True for flat batches. `flat` is what --padding_free asked for; None = wherever it is exact."""
    refusal = refusal_of_flat(base, base.config)
    if flat and refusal:
        raise ConfigError(
            f"--padding_free true: {type(base).__name__} cannot run without padding, because {refusal}",
            hint="leave --padding_free out",
        )
    return refusal is None if flat is None else flat
