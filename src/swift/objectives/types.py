"""What an engine hands to an objective, and what it gets back.

Shapes: T = tokens of the micro-batch, S = segments, C = classes, D = width of an embedding.
Not here: any formula, any normalisation over ranks.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from swift.batch import Batch

HEADS = frozenset({"scores", "class_logits", "embeddings"})  # stats of a head at the end of each segment


@dataclass(frozen=True, slots=True)
class TokenStats:
    """What the model said about a batch, in float32 at least. Only what the objective needs is filled."""

    logps: Tensor | None = None  # [T] natural log p(labels[t]); 0 where the token is not trained
    correct: Tensor | None = None  # [T] bool: labels[t] is the most likely token; False where not trained
    logits_mean: Tensor | None = None  # [T] mean logit over the vocabulary, no gradient; 0 where not trained
    mean_logps: Tensor | None = None  # [T] log p averaged over the vocabulary; 0 where not trained
    entropy: Tensor | None = None  # [T] nats of the distribution over the next token, no gradient; 0 likewise
    router_logits: tuple[Tensor, ...] | None = None  # [T, experts] of every layer with a router
    values: Tensor | None = None  # [T] of a head with one output, at each trained token; 0 likewise
    teacher: "Teacher | None" = None
    scores: Tensor | None = None  # [S] one number a segment, of a reward or reranking head
    class_logits: Tensor | None = None  # [S, C] of a classification head with C classes
    embeddings: Tensor | None = None  # [S, D]


class Teacher(Protocol):
    """Another model on the same batch, to be compared with the one that is trained."""

    def divergence(self, beta: float, top_k: int | None) -> Tensor:
        """[T] how far the model is from the teacher (see distill.py); 0 where not trained."""
        ...


@dataclass(frozen=True, slots=True)
class LossSum:
    """Un-normalised sums of one micro-batch. The engine divides by global counts; nobody else does."""

    terms: dict[str, Tensor]  # unit name -> scalar sum
    metrics: dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count), on the device


class Objective(Protocol):
    """A pure function of (stats, batch). It sees no process group and no global count."""

    needs: frozenset[str]  # fields of TokenStats
    couples_rows: ClassVar[bool] = False  # a row's loss depends on the others in its micro-batch

    def units(self, batch: Batch) -> dict[str, int]:
        """How many tokens, pairs or sequences of `batch` each term is averaged over."""
        ...

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum: ...
