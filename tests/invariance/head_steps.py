"""Tasks that end in a head instead of tokens, for two engines to be compared step by step."""

from dataclasses import dataclass

import torch

from swift.batch import IGNORED, Batch
from swift.config.optim import OptimConfig
from swift.engines.protocol import Engine
from swift.objectives.classification import Classification
from swift.objectives.embedding import EmbeddingPairs, PointwiseReranker
from swift.objectives.reward import Reward
from swift.objectives.types import Objective
from swift.objectives.value import Value

STEPS, RATE = 2, 3e-3
# With AdamW's usual 1e-8, a gradient that is zero but for rounding moves a weight as far as any other.
OPTIM = OptimConfig(weight_decay=0.1, max_grad_norm=1.0, adam_beta2=0.95, adam_epsilon=1e-4)


@dataclass(frozen=True)
class Task:
    """A head of `head` outputs; 0 = what would enter one, None = logits, of which two make up the score."""

    head: int | None
    unit: str
    objective: Objective
    verdict: tuple[int, int] | None = None


TASKS = {
    "rm": Task(1, "pairs", Reward()),
    "classes": Task(3, "sequences", Classification()),
    "embedding": Task(0, "pairs", EmbeddingPairs()),
    "judged": Task(None, "sequences", PointwiseReranker(), (7, 300)),
    "values": Task(1, "tokens", Value(0.5, 0.1)),
}


def make_batches(step: int, engine: Engine) -> list[Batch]:
    """Micro-batches of this data rank: three in all, of two pairs each."""
    batches = []
    for number in range(3):
        generator = torch.Generator().manual_seed(10 * step + number)
        lengths = torch.randint(2, 12, (4,), generator=generator)
        ids = torch.randint(3, 256, (int(lengths.sum()),), generator=generator)
        labels = ids.roll(-1)
        labels[lengths.cumsum(0) - 1] = IGNORED
        segment = {"label": torch.randint(0, 2, (4,), generator=generator)}
        token = {name: torch.randn(len(ids), generator=generator) for name in ("old_values", "returns")}
        batches.append(Batch(ids, labels, torch.arange(4).repeat_interleave(lengths), 4, token, segment))
    return batches[engine.data_rank :: engine.data_world]
