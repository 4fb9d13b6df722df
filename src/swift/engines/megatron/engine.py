"""The engine over megatron-core: the same protocol, its layers, schedules and optimizer.

Not here: batches and losses (schedule.py), process groups (setup.py), files (checkpoint.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from swift.batch import Batch
from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.engines.megatron.balance import take_sums
from swift.engines.megatron.bridge import Bridge
from swift.engines.megatron.checkpoint import Files, load_checkpoint, parts_of, take_snapshot
from swift.engines.megatron.context import ContextRanks
from swift.engines.megatron.lora import adapters_of
from swift.engines.megatron.schedule import Form, KeptRows, Schedule, Taught
from swift.engines.megatron.settings import Settings
from swift.engines.megatron.teacher import rows_of
from swift.engines.megatron.weights import stream_weights
from swift.engines.offload import set_aside
from swift.engines.optim import build_scheduler
from swift.engines.protocol import Snapshot, StepInfo, Sums
from swift.engines.ranks import Ranks
from swift.engines.stepping import NOTHING, add_units, collect_sums, gather_rows
from swift.objectives.sft import has_trained
from swift.objectives.types import LossSum, Objective, TokenStats


@dataclass(frozen=True)
class Wrapping:
    """How gradients and optimizer states are spread over data ranks."""

    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class MegatronEngine:
    """The chunks of a model that this rank holds, and their optimizer: `swift.engines.protocol.Engine`."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        settings: Settings,
        config: OptimConfig,
        *,
        vocabulary: int,
        learning_rate: float,
        total_steps: int,
        ranks: Ranks,
        wrapping: Wrapping | None = None,
        context: ContextRanks | None = None,
        frozen: Sequence[GPTModel] | None = None,
        files: Files | None = None,
        temperature: float = 1.0,
        verdict: tuple[int, int] | None = None,
    ) -> None:
        """`frozen`: the reference of full-parameter training, laid out as the model is; for objectives that
        need a teacher it is that.

        Chunks with adapters (lora.py) are their own reference. `temperature`: what all logits are divided by.
        `verdict`: the tokens for yes and no whose logits are the scores of a language model.
        """
        self.settings, self.ranks, self.wrapping = settings, ranks, wrapping or Wrapping()
        self.data_rank, self.data_world = ranks.data_rank, ranks.data_world
        self.dtype = settings.params_dtype
        self.device = torch.device(torch.cuda.current_device())
        self.flat = True
        self.step = 0
        self.files = files
        self.plain = list(chunks)  # without their wrappers
        self.frozen = None if frozen is None else [chunk.requires_grad_(False).eval() for chunk in frozen]
        for chunk in (*self.plain, *(self.frozen or ())):
            if chunk.post_process:
                chunk.kept = KeptRows(chunk.output_layer)
        form = Form(settings, vocabulary, self.device, context or ContextRanks(), temperature, verdict)
        self.schedule = Schedule(form)
        self.num_parameters = count_parameters(self.plain, ranks)
        self.adapters = adapters_of(self.plain)
        self.chunks = self._wrap()
        self.active: Sequence[Any] = self.chunks
        self.optimizer = build_optimizer(self.chunks, settings, config, learning_rate, self.wrapping)
        settings.grad_scale_func = self.optimizer.scale_loss
        # The rates of all groups follow those of one parameter that is nowhere.
        self.clock = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        self.scheduler = build_scheduler(self.clock, config, total_steps)

    def _wrap(self) -> list[DistributedDataParallel]:
        wrapping, settings = self.wrapping, self.settings
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=wrapping.overlap_grad_reduce,
            overlap_param_gather=wrapping.overlap_param_gather,
            use_distributed_optimizer=wrapping.distributed_optimizer,
            average_in_collective=False,
        )
        chunks = [
            DistributedDataParallel(settings, config, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(self.plain)
        ]
        settings.finalize_model_grads_func = finalize_model_grads
        if wrapping.overlap_grad_reduce:
            one_chunk = len(chunks) == 1
            quiet, start = [c.no_sync for c in chunks], [c.start_grad_sync for c in chunks]
            settings.no_sync_func = quiet[0] if one_chunk else quiet
            if settings.pipeline_model_parallel_size > 1:
                settings.grad_sync_func = start[0] if one_chunk else start
        return chunks

    def _even_out(self, batches: Sequence[Batch]) -> list[Batch]:
        """As many micro-batches on every data rank; whole rounds of them where stages hold several chunks."""
        longest = int(max(row[0] for row in self.ranks.gather([len(batches)])))
        if self.settings.virtual_pipeline_model_parallel_size:
            longest += -longest % self.settings.pipeline_model_parallel_size
        return [*batches, *[NOTHING] * (longest - len(batches))]

    def forward(self, batches: Sequence[Batch], needs: frozenset[str]) -> list[TokenStats]:
        for chunk in self.active:
            chunk.eval()
        even = self._even_out(batches)
        alone = self._teach(even, frozenset())
        found = self.schedule.forward(self.active, alone, needs, lambda stats, *_: stats)
        return [self._share(found[i] if found else None, batch, needs) for i, batch in enumerate(batches)]

    def _share(self, stats: TokenStats | None, batch: Batch, needs: frozenset[str]) -> TokenStats:
        """The last stage's stats, on every stage."""
        if self.settings.pipeline_model_parallel_size == 1:
            assert stats is not None
            return stats
        shared: dict[str, Tensor] = {}
        count, width = batch.num_segments, self.settings.hidden_size
        shapes = {
            "scores": (count,),
            "class_logits": (count, self.settings.head),
            "embeddings": (count, width),
        }
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        group = parallel_state.get_pipeline_model_parallel_group()
        for name in sorted(needs):
            dtype = torch.bool if name == "correct" else torch.promote_types(self.dtype, torch.float32)
            values = None if stats is None else getattr(stats, name)
            if values is None:
                values = torch.empty(shapes.get(name, (batch.num_tokens,)), dtype=dtype, device=self.device)
            values = values.to(dtype)
            dist.broadcast(values, source, group=group)
            shared[name] = values
        return TokenStats(**shared)

    def forward_backward(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        even = self._even_out(batches)
        units = [objective.units(batch) for batch in even]
        totals = add_units([*units, objective.units(NOTHING)])
        trained = sum(int(batch.trained.sum()) for batch in even)
        routed = sum(int(has_trained(batch)[batch.segment_ids].sum()) for batch in even)
        counts = self.ranks.sum([trained, routed, *(totals[unit] for unit in sorted(totals))])
        step_units = dict(zip(sorted(totals), counts[2:], strict=True))
        # megatron-core divides all gradients by the trained tokens; routers are for all tokens of their rows.
        self.settings.per_token = counts[0] / max(counts[1], 1)
        taught = self._teach(even, objective.needs)
        results = self.schedule.forward_backward(self.chunks, taught, objective, step_units, int(counts[0]))
        sums = self._collect(results, even, units)
        for name, total in self._routers().items():
            sums.add(name, total, counts[1])
        return sums

    def _routers(self) -> dict[str, float]:
        """Losses of the routers in this step: means over layers, sums over tokens. Called by all ranks."""
        if not self.settings.num_moe_experts:
            return {}
        mine = {name: float(value) for name, value in take_sums(self.plain).items()}
        parts = self.ranks.collect(mine)
        layers = sum(self.settings.sparse)
        names = sorted({name for part in parts for name in part})
        return {name: sum(part.get(name, 0.0) for part in parts) / layers for name in names}

    def _teach(self, batches: Sequence[Batch], needs: frozenset[str]) -> list[Taught]:
        """Each batch with what the teacher says of it: on the last stage, for objectives that compare."""
        alone: list[Taught] = [(batch, None) for batch in batches]
        if "teacher" not in needs or self.frozen is None:
            return alone
        last = self.frozen[-1]
        if last.post_process:  # it gives logits by `rows_of` alone from now on
            last.kept.withholds = True
        found = self.schedule.forward(self.frozen, alone, frozenset(), lambda *_: rows_of(last))
        return list(zip(batches, found, strict=True)) if found else alone

    def measure(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        for chunk in self.active:
            chunk.eval()
        even = self._even_out(batches)
        results = self.schedule.forward(
            self.active,
            self._teach(even, objective.needs),
            objective.needs,
            lambda stats, batch, _: objective(stats, batch.to(self.device)),
        )
        return self._collect(results, even, [objective.units(batch) for batch in even])

    def _collect(
        self, results: Sequence[LossSum], batches: Sequence[Batch], units: Sequence[dict[str, int]]
    ) -> Sums:
        """Sums over all micro-batches and data ranks, on every process. Only last stages know losses."""
        local = collect_sums(results, units) if results else Sums()
        local.add("tokens", sum(batch.num_tokens for batch in batches if batch is not NOTHING), 0)
        total = Sums()
        parts = self.ranks.collect(local)
        for speaker in self.ranks.speakers:
            total.merge(parts[speaker])
        return total

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        return gather_rows(values, self.ranks)

    def optim_step(self) -> StepInfo:
        learning_rate = self.scheduler.get_last_lr()[0]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        applied, grad_norm, _ = self.optimizer.step()
        if applied:
            self.clock.step()
            self.scheduler.step()
            self.step += 1
        return StepInfo(float(grad_norm), learning_rate, bool(applied))

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.active = self.frozen or self.chunks
        for adapter in self.adapters:
            adapter.enabled = False
        try:
            yield
        finally:
            self.active = self.chunks
            for adapter in self.adapters:
                adapter.enabled = True

    def mix_reference(self, share: float) -> None:
        raise NotImplementedError("--sync_ref_model is refused for megatron")

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        raise ConfigError(
            "megatron cannot answer with the model that it trains", hint="--use_vllm true answers with vLLM"
        )
        yield  # makes it the context manager that the protocol asks for

    def set_aside(self, *, weights: bool, moments: bool) -> AbstractContextManager[None]:
        on_gpu = self.device.type == "cuda"
        return set_aside(self.movable(weights=weights, moments=moments) if on_gpu else ())

    def movable(self, *, weights: bool, moments: bool) -> Iterator[Tensor]:
        """Tensors whose memory nothing needs between two steps; masters go with the moments."""
        if weights:
            for chunk in (*self.plain, *(self.frozen or ())):
                yield from chunk.parameters()
        for part in parts_of(self.optimizer) if moments else ():
            for master, state in part.optimizer.state.items():
                yield from (x for x in (master, *state.values()) if torch.is_tensor(x) and x.dim())

    def drop_reference(self) -> None:
        self.frozen = None
        torch.cuda.empty_cache()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        assert self.files is not None
        if self.wrapping.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)  # what the last step has not yet sent around
        return stream_weights(self.plain, Bridge(self.files.config, self.settings), self.device)

    def save(self, path: Path, *, resumable: bool) -> Snapshot:
        return take_snapshot(self, path, resumable=resumable)

    def load(self, path: Path, *, optimizer: bool = True, random: bool = True) -> None:
        """Goes on from what `save` wrote, under any layout."""
        load_checkpoint(self, path, optimizer=optimizer, random=random)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    settings: Settings,
    config: OptimConfig,
    learning_rate: float,
    wrapping: Wrapping,
) -> MegatronOptimizer:
    """megatron-core's AdamW over the chunks: float32 master weights, clipped by one global norm."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_epsilon,
            clip_grad=config.max_grad_norm,
            bf16=settings.bf16,
            fp16=settings.fp16,
            params_dtype=settings.params_dtype,
            use_distributed_optimizer=wrapping.distributed_optimizer,
            overlap_param_gather=wrapping.overlap_param_gather,
        ),
        list(chunks),
    )
    for group in optimizer.param_groups:
        # Which megatron-core leaves to a scheduler of its own.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        if torch.cuda.is_available() and "fused" in group:
            group["fused"], group["foreach"] = True, False
    return optimizer


def count_parameters(chunks: Sequence[GPTModel], ranks: Ranks) -> tuple[int, int]:
    """Trained and all parameters of the whole model. Called by all ranks."""
    trained = every = 0
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    first_of_experts = parallel_state.get_expert_data_parallel_rank() == 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            cut = getattr(parameter, "tensor_model_parallel", False)
            if not (cut or parallel_state.get_tensor_model_parallel_rank() == 0):
                continue
            is_copy = getattr(parameter, "shared", False)
            if not is_copy and (first if getattr(parameter, "allreduce", True) else first_of_experts):
                every += parameter.numel()
                trained += parameter.numel() * parameter.requires_grad
    counts = ranks.collect((trained, every))
    return sum(count[0] for count in counts), sum(count[1] for count in counts)
