"""Embeddings and rerankers.

Three layouts of the segments of a batch, each with a column:
- pairs of texts, 2p and 2p + 1; segment["label"] [S], read at 2p: how alike they are;
- groups: anchor, its positive, any number of negatives; segment["role"] [S]: 0, 1 and 2;
- documents of a query, the right one first; segment["label"] [S]: 1 starts a query, 0 follows.
Not here: the pooling that makes one vector or one score of a segment.
Shapes: S = segments, P = pairs, D = width of an embedding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.batch import Batch
from swift.objectives.reduce import column, is_filler, mean_of, pair_up, settle, weighted
from swift.objectives.types import LossSum, Objective, TokenStats

MARGIN = 0.5  # cosine distance beyond which unlike texts are left alone
FAKE_NEGATIVE = 0.1  # a "negative" this much closer than the positive is taken for another right answer


def _squared_error(cosine_P: Tensor, label_P: Tensor) -> Tensor:
    return (cosine_P - label_P).square()


def _contrastive(cosine_P: Tensor, label_P: Tensor) -> Tensor:
    """Hadsell, Chopra and LeCun 2006, eq. 4, over the cosine distance."""
    distance_P = 1 - cosine_P
    return 0.5 * (label_P * distance_P.square() + (1 - label_P) * F.relu(MARGIN - distance_P).square())


def _online_contrastive(cosine_P: Tensor, label_P: Tensor) -> Tensor:
    """The same, twice as strong, over the hard pairs of the micro-batch.

    Hard are unlike texts closer than the farthest alike ones, and alike texts farther than the closest unlike
    ones. Where the other kind has fewer than two pairs, the bound is the mean of the own kind.
    Source: OnlineContrastiveLoss of sentence-transformers.
    """
    distance_P = 1 - cosine_P
    is_alike_P, is_unlike_P = label_P == 1, label_P == 0
    seen_P = distance_P.detach()

    def mean_where(mask_P: Tensor) -> Tensor:
        return (seen_P * mask_P).sum() / mask_P.sum().clamp(min=1)

    farthest = torch.where(is_alike_P, seen_P, -torch.inf).amax()
    closest = torch.where(is_unlike_P, seen_P, torch.inf).amin()
    near = torch.where(is_alike_P.sum() > 1, farthest, mean_where(is_unlike_P))
    far = torch.where(is_unlike_P.sum() > 1, closest, mean_where(is_alike_P))
    pull_P = distance_P.square() * (is_alike_P & (seen_P > far))
    return pull_P + F.relu(MARGIN - distance_P).square() * (is_unlike_P & (seen_P < near))


PAIR_LOSSES = {
    "cosine_similarity": _squared_error,
    "contrastive": _contrastive,
    "online_contrastive": _online_contrastive,
}


@dataclass(frozen=True)
class EmbeddingPairs(Objective):
    """Cosines of pairs of texts against labels: 1 alike, 0 not, for cosine_similarity anything between."""

    loss_type: str = "cosine_similarity"

    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})

    @property
    def couples_rows(self) -> bool:
        return self.loss_type == "online_contrastive"

    def units(self, batch: Batch) -> dict[str, int]:
        return {"pairs": batch.num_segments // 2}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.embeddings is not None, "EmbeddingPairs needs embeddings"
        nothing = stats.embeddings.sum() * 0.0
        if is_filler(batch):
            return LossSum({"pairs": nothing}, {})
        first, second = stats.embeddings[0::2], stats.embeddings[1::2]
        label_P = pair_up(batch.segment["label"].to(first.dtype))[:, 0]
        loss_P = PAIR_LOSSES[self.loss_type](F.cosine_similarity(first, second), label_P)
        return LossSum({"pairs": loss_P.sum() + nothing}, {})


@dataclass(frozen=True)
class InfoNce(Objective):
    """Which of the candidates belongs to the anchor: cross entropy of cosines / temperature.

    Candidates are the positives and negatives of the micro-batch, or with `in_batch` False those of the
    anchor's own group. `mask_fake_negatives` leaves out candidates clearly closer than the positive.
    Source: arXiv:1807.03748 eq. 4, with explicit negatives as arXiv:2004.04906 eq. 2.
    """

    temperature: float = 0.01
    in_batch: bool = True
    mask_fake_negatives: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})

    @property
    def couples_rows(self) -> bool:
        return self.in_batch

    def units(self, batch: Batch) -> dict[str, int]:
        return {"groups": 0 if is_filler(batch) else int((batch.segment["role"] == 0).sum())}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.embeddings is not None, "InfoNce needs embeddings"
        units_SD = F.normalize(stats.embeddings, dim=-1)
        role_S = column(batch, "role", stats.embeddings.detach()[:, 0])
        is_anchor_S = role_S == 0
        cosine_SS = units_SD @ units_SD.T
        positive_S = F.pad(cosine_SS.diagonal(1), (0, 1))  # a positive stands right behind its anchor
        excluded_SS = is_anchor_S[None, :].expand_as(cosine_SS)
        if not self.in_batch:
            group_S = is_anchor_S.cumsum(0)
            excluded_SS = excluded_SS | (group_S[:, None] != group_S[None, :])
        if self.mask_fake_negatives:
            excluded_SS = excluded_SS | (cosine_SS > positive_S[:, None] + FAKE_NEGATIVE)
        scores_SS = (cosine_SS / self.temperature).masked_fill(excluded_SS, torch.finfo(cosine_SS.dtype).min)
        loss_S = scores_SS.logsumexp(1) - positive_S / self.temperature
        loss = (loss_S * is_anchor_S).sum()
        return settle(LossSum({"groups": loss}, {"mean_pos": weighted(positive_S, is_anchor_S)}), batch)


@dataclass(frozen=True)
class PointwiseReranker(Objective):
    """Each document alone: is it right for its query? Binary cross entropy of stats.scores."""

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    def units(self, batch: Batch) -> dict[str, int]:
        return {"sequences": 0 if is_filler(batch) else batch.num_segments}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.scores is not None, "PointwiseReranker needs scores"
        label_S = column(batch, "label", stats.scores.detach())
        loss = F.binary_cross_entropy_with_logits(stats.scores, label_S, reduction="sum")
        right_S = (stats.scores.detach() > 0) == (label_S > 0.5)
        return settle(LossSum({"sequences": loss}, {"acc": mean_of(right_S.to(torch.float32))}), batch)


@dataclass(frozen=True)
class ListwiseReranker(Objective):
    """The right document among those of its query: cross entropy of scores / temperature.

    A query with a single document teaches nothing and is not counted; neither are documents before the first
    right one. Source: ListNet with one relevant document, Cao et al. 2007. Queries do not see each
    other, so this couples no rows as long as a query stays in one micro-batch.
    """

    temperature: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    def units(self, batch: Batch) -> dict[str, int]:
        return {"queries": 0 if is_filler(batch) else int(_starts_query(batch.segment["label"]).sum())}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.scores is not None, "ListwiseReranker needs scores"
        label_S = column(batch, "label", stats.scores.detach())
        starts_S = _starts_query(label_S)
        query_S = (label_S == 1).cumsum(0)
        scores_S = stats.scores / self.temperature
        others_SS = query_S[:, None] != query_S[None, :]
        table_SS = scores_S[None, :].expand_as(others_SS)
        table_SS = table_SS.masked_fill(others_SS, torch.finfo(scores_S.dtype).min)
        loss_S = table_SS.logsumexp(1) - scores_S
        first_S = table_SS.detach().argmax(1) == torch.arange(len(scores_S), device=scores_S.device)
        metrics = {"acc": weighted(first_S.to(scores_S.dtype), starts_S)}
        return settle(LossSum({"queries": (loss_S * starts_S).sum()}, metrics), batch)


def _starts_query(label_S: Tensor) -> Tensor:
    """[S] bool: right documents that at least one wrong one follows."""
    return (label_S == 1) & F.pad(label_S[1:] != 1, (0, 1), value=False)
