"""Batches and settings that two engines train adapters on, to be compared step by step."""

import torch

from swift.batch import IGNORED, Batch
from swift.config.optim import OptimConfig
from swift.config.sft import SftConfig
from swift.objectives.sft import Sft

STEPS, RATE, BATCHES = 3, 3e-3, 4
# With AdamW's usual 1e-8, a gradient that is zero but for rounding moves a weight as far as any other.
OPTIM = OptimConfig(weight_decay=0.1, max_grad_norm=1.0, adam_beta2=0.95, adam_epsilon=1e-4)


def make_objective() -> Sft:
    return Sft(SftConfig())


def make_batches(step: int) -> list[Batch]:
    """Micro-batches of several rows each, of uneven lengths, partly trained; one of them not at all."""
    generator = torch.Generator().manual_seed(200 + step)
    batches = []
    for number in range(BATCHES):
        lengths = torch.randint(3, 14, (3,), generator=generator)
        ids = torch.randint(3, 256, (int(lengths.sum()),), generator=generator)
        labels = ids.roll(-1)
        labels[lengths.cumsum(0) - 1] = IGNORED
        labels[torch.rand(len(ids), generator=generator) < 0.3] = IGNORED
        if number == 3:
            labels[:] = IGNORED
        batches.append(Batch(ids, labels, torch.arange(3).repeat_interleave(lengths), 3))
    return batches
