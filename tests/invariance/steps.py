"""Batches and settings that two engines train on, to be compared step by step."""

from typing import Any

import torch

from swift.batch import IGNORED, Batch
from swift.config.optim import OptimConfig
from swift.config.sft import SftConfig
from swift.engines.protocol import Engine
from swift.objectives.distill import Distill
from swift.objectives.policy import Policy, PolicyRule
from swift.objectives.sft import Sft

TEMPERATURE = 0.8
ONLINE = (
    Policy(PolicyRule(beta=0.1, log_entropy=True, has_rollout_logps=True)),
    Distill(beta=0.3, sft_alpha=0.2),
)
STATS = ("logps", "correct", "logits_mean", "mean_logps", "entropy")
RATE, BATCHES, UNSEEN = 3e-3, 4, 99
# With AdamW's usual 1e-8, a gradient that is zero but for rounding moves a weight as far as any other.
OPTIM = OptimConfig(weight_decay=0.1, max_grad_norm=1.0, adam_beta2=0.95, adam_epsilon=1e-4)
VOCABULARY = 256


def make_objective() -> Sft:
    return Sft(SftConfig())


def make_batches(step: int) -> list[Batch]:
    """Micro-batches of several rows each, of uneven lengths, partly trained; one of them not at all."""
    generator = torch.Generator().manual_seed(100 + step)
    batches = []
    for number in range(BATCHES):
        lengths = torch.randint(3, 14, (3,), generator=generator)
        total = int(lengths.sum())
        ids = torch.randint(0, VOCABULARY, (total,), generator=generator)
        labels = ids.roll(-1)
        labels[lengths.cumsum(0) - 1] = IGNORED
        labels[torch.rand(total, generator=generator) < 0.3] = IGNORED
        if number == 3:
            labels[:] = IGNORED
        batches.append(Batch(ids, labels, torch.arange(3).repeat_interleave(lengths), 3))
    return batches


def make_online_batches(engine: Engine) -> list[Batch]:
    """Micro-batches of this data rank: advantages, an old policy near the new one, and a far teacher."""
    batches = make_batches(7)[engine.data_rank :: engine.data_world]
    for number, stats in enumerate(engine.forward(batches, frozenset({"logps"}))):
        batch, index = batches[number], engine.data_rank + number * engine.data_world
        generator = torch.Generator().manual_seed(index)
        token = {"advantages": torch.randn(batch.num_segments, generator=generator)[batch.segment_ids]}
        noise = 0.3 * torch.randn(3, batch.num_tokens, generator=generator) * batch.trained
        for name, noise_T in zip(("old_logps", "ref_logps", "rollout_logps"), noise, strict=True):
            token[name] = stats.logps.cpu() + noise_T
        told = torch.randn(batch.num_tokens, VOCABULARY, generator=generator).log_softmax(-1).topk(5)
        token["teacher_logps"], token["teacher_ids"] = told
        batch.token.update(token)
    return batches


def take_online_steps(engine: Engine) -> list[dict[str, Any]]:
    """What each objective of online training measures, and the norm of its gradients."""
    found = []
    for objective in ONLINE:
        sums = engine.forward_backward(make_online_batches(engine), objective)
        found.append(sums.means() | {"grad_norm": engine.optim_step().grad_norm})
    return found
