"""Random float64 batches, and TRL's own losses called on the same numbers.

TRL's losses are methods of trainers; an object made without its constructor, with the attributes that the
loss reads, is enough to call them. Shapes: T = tokens, S = segments, L = longest segment.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from swift.batch import IGNORED, Batch
from swift.objectives.types import LossSum, Objective, TokenStats

VOCABULARY = 11


def make_batch(lengths: list[int], *, seed: int = 0, trained_from: int = 2, **segment: Any) -> Batch:
    """Segments whose first `trained_from` - 1 labels and last one are not trained; with reference logps."""
    generator = torch.Generator().manual_seed(seed)
    total, segments = sum(lengths), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    labels = torch.randint(0, VOCABULARY, (total,), generator=generator)
    batch = Batch(torch.zeros(total, dtype=torch.int64), labels, segments, len(lengths))
    positions, last = batch.positions(), torch.tensor(lengths)[segments] - 1
    labels[(positions < trained_from - 1) | (positions == last)] = IGNORED
    ref = -torch.rand(total, generator=generator, dtype=torch.float64) * 3 * batch.trained
    columns = {name: torch.as_tensor(values) for name, values in segment.items()}
    return replace(batch, token={"ref_logps": ref}, segment=columns)


def make_logps(batch: Batch, *, seed: int = 1) -> Tensor:
    """[T] float64 leaf: random log-probabilities, 0 where not trained."""
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(batch.num_tokens, generator=generator, dtype=torch.float64) * 3 * batch.trained
    return logps.requires_grad_()


def make_stats(logps: Tensor) -> TokenStats:
    return TokenStats(logps=logps, logits_mean=torch.sin(logps.detach() * 7))


def select(batch: Batch, logps: Tensor, segments: list[int]) -> tuple[Batch, TokenStats]:
    """The named segments as a batch of their own; gradients still reach `logps`."""
    keep = torch.isin(batch.segment_ids, torch.tensor(segments))
    renumbered = torch.searchsorted(torch.tensor(segments), batch.segment_ids[keep])
    part = Batch(
        batch.input_ids[keep],
        batch.labels[keep],
        renumbered,
        len(segments),
        {name: values[keep] for name, values in batch.token.items()},
        {name: values[segments] for name, values in batch.segment.items()},
    )
    stats = make_stats(logps)
    return part, TokenStats(logps=stats.logps[keep], logits_mean=stats.logits_mean[keep])


def total_loss(objective: Objective, results: list[LossSum], batches: list[Batch]) -> Tensor:
    """The engine's rule: every term over the units of all batches."""
    units: dict[str, int] = defaultdict(int)
    for batch in batches:
        for unit, count in objective.units(batch).items():
            units[unit] += count
    return sum(term / max(units[unit], 1) for result in results for unit, term in result.terms.items())


def loss_and_gradient(objective: Objective, batch: Batch, logps: Tensor) -> tuple[Tensor, Tensor]:
    loss = total_loss(objective, [objective(make_stats(logps), batch)], [batch])
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def metric(result: LossSum, name: str) -> float:
    total, count = result.metrics[name]
    return float(total / count)


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def padded(values: Tensor, batch: Batch, order: Tensor) -> Tensor:
    """[S, L - 1] of [T] values, segments in `order`, positions without a next token left out."""
    longest = int(batch.segment_lengths().max())
    flat = batch.segment_ids * longest + batch.positions()
    table = values.new_zeros(batch.num_segments * longest).index_put((flat,), values)
    return table.view(batch.num_segments, longest)[order][:, : longest - 1]


def completion_mask(batch: Batch, order: Tensor) -> Tensor:
    """[S, L]: tokens that are predicted in the loss; TRL shifts them itself."""
    mask = padded(batch.trained.long(), batch, order)
    return torch.nn.functional.pad(mask, (1, 0))


class FakeModel(torch.nn.Module):
    """Answers with given log-probabilities; the names are those of TRL's fused output layer."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor) -> None:
        super().__init__()
        zeros = torch.zeros_like(logps.detach())
        self.output = SimpleNamespace(
            log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
        )

    def forward(self, **_: Any) -> SimpleNamespace:
        return self.output


def trl_trainer(trainer_class: type, model: FakeModel, ref_model: FakeModel | None, **attributes: Any) -> Any:
    """A trainer of TRL with nothing but what its loss reads."""
    trainer = object.__new__(trainer_class)
    trainer.__dict__.update(
        model=model,
        ref_model=ref_model,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.__dict__.update(attributes)
    return trainer
