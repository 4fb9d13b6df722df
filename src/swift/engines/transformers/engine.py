"""The engine over a transformers model in one process.

Owns: the micro-batch loop, the scaling rule, clipping, the step.
Not here: layouts (forward.py), files (checkpoint.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from packaging import version
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from swift.batch import Batch
from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.engines.optim import build_optimizer, build_scheduler
from swift.engines.protocol import StepInfo, Sums
from swift.engines.transformers import checkpoint
from swift.engines.transformers.attention import FLAT_ATTENTION
from swift.engines.transformers.forward import refusal_of_flat, score
from swift.objectives.types import LossSum, Objective, TokenStats


class TransformersEngine:
    """One model, one optimizer, one process. Implements `swift.engines.protocol.Engine`."""

    data_rank = 0
    data_world = 1

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
    ) -> None:
        self.model = model
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.device = next(model.parameters()).device
        self.dtype = base.dtype
        self.flat = choose_layout(base, flat)
        if self.flat and own_attention:
            base.set_attn_implementation(FLAT_ATTENTION)
        if gradient_checkpointing:
            enable_recompute(base)
        self.max_grad_norm = config.max_grad_norm
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, config, learning_rate)
        self.scheduler = build_scheduler(self.optimizer, config, total_steps)

    def _score(self, batch: Batch, needs: frozenset[str]) -> TokenStats:
        # Adapters are kept in float32 beside a half-precision model: autocast runs both in the model's dtype.
        is_half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, self.dtype, enabled=is_half):
            return score(self.model, batch, needs, flat=self.flat, device=self.device)

    def forward(self, batches: Sequence[Batch], needs: frozenset[str]) -> list[TokenStats]:
        self.model.eval()
        with torch.no_grad():
            return [self._score(b, needs) for b in batches]

    def forward_backward(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        self.model.train()
        units = [objective.units(b) for b in batches]
        step_units = add_units(units)
        results = []
        for batch in batches:
            result = objective(self._score(batch, objective.needs), batch.to(self.device))
            # The scale rule, single process: L = sum of term / units of the whole step, and nothing else.
            sum(term / max(step_units[unit], 1) for unit, term in result.terms.items()).backward()
            results.append(result)
        return collect_sums(results, units)

    def measure(self, batches: Sequence[Batch], objective: Objective) -> Sums:
        self.model.eval()
        with torch.no_grad():
            results = [objective(self._score(b, objective.needs), b.to(self.device)) for b in batches]
        return collect_sums(results, [objective.units(b) for b in batches])

    def optim_step(self) -> StepInfo:
        limit = self.max_grad_norm or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.trainable, limit)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(float(grad_norm), learning_rate)

    @contextmanager
    def reference(self) -> Iterator[None]:
        assert isinstance(self.model, PeftModel), "a frozen copy for full training is not built here"
        with self.model.disable_adapter():
            yield

    def save(self, path: Path, *, resumable: bool) -> None:
        checkpoint.save_weights(self.model, path)
        if resumable:
            checkpoint.save_state(path, self.optimizer, self.scheduler)

    def load(self, path: Path) -> None:
        checkpoint.load_weights(self.model, path)
        checkpoint.load_state(path, self.optimizer, self.scheduler)


def enable_recompute(model: PreTrainedModel) -> None:
    """Activations are computed again in the backward pass instead of being kept."""
    options = {"use_reentrant": False}
    if version.parse(transformers.__version__) >= version.parse("5.23"):  # renamed there
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


def add_units(units: Sequence[dict[str, int]]) -> dict[str, int]:
    """Units of the whole step: what every term is divided by, however the step is cut up."""
    totals: dict[str, int] = {}
    for counts in units:
        for unit, count in counts.items():
            totals[unit] = totals.get(unit, 0) + count
    return totals


def collect_sums(results: Sequence[LossSum], units: Sequence[dict[str, int]]) -> Sums:
    """All sums of a step, fetched from the device at once. A loss stays a (sum, count) pair for each unit."""
    names: list[str] = []
    values: list[Tensor] = []
    for result, counts in zip(results, units, strict=True):
        for unit, term in result.terms.items():
            names.append(f"loss/{unit}")
            values += [
                term.detach().double(),
                torch.tensor(counts[unit], dtype=torch.float64, device=term.device),
            ]
        for name, (total, count) in result.metrics.items():
            names.append(name)
            values += [total.detach().double(), count.double()]
    sums = Sums()
    numbers = torch.stack(values).tolist() if values else []
    for name, total, count in zip(names, numbers[0::2], numbers[1::2], strict=True):
        sums.add(name, total, count)
    return sums
