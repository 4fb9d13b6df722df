"""Distillation: a student drawn to the distribution of a teacher, over the answers of either.

The teacher's side reaches an objective as `stats.teacher`, a Teacher: the engine has run the teacher beside
the model (it stands where a reference model stands, `frozen`) and gives its logits some rows at a time, so
two whole tensors of them never exist. Or it is far away: then token["teacher_ids"] and
token["teacher_logps"], [T, K], hold what it thought most likely at each position. Not here: who answered,
and what the teacher was shown. Shapes: T = tokens, N = those with logits, n = some of N, V = vocabulary, K
= the teacher's most likely tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift.batch import Batch
from swift.objectives.logits import Judged, rows_at_once
from swift.objectives.reduce import column, is_filler, settle, weighted
from swift.objectives.types import LossSum, Objective, TokenStats

COPIES = 2  # a chunk and the gradient of its divergence take about four times CHUNK_BYTES


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """[...] generalised Jensen-Shannon divergence of log-probabilities [..., V].

    With M = beta teacher + (1 - beta) student: beta KL(teacher || M) + (1 - beta) KL(student || M). It
    vanishes at its ends, so they stand for the limits of its shape: 0 is KL(teacher || student), 1
    KL(student || teacher). Source: arXiv:2306.13649 eq. 1.
    """
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    forward = (teacher.exp() * (teacher - mixture)).sum(-1)
    return beta * forward + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)


@dataclass(frozen=True, slots=True)
class LocalTeacher:
    """A teacher that has been run beside the model. Implements Teacher."""

    view: Any  # DenseLogits of the student
    rows: Callable[[slice], Tensor]  # of N -> the teacher's logits there, [n, V]
    spread: Callable[[Tensor], Tensor]  # [N] -> [T] of the whole batch

    def divergence(self, beta: float, top_k: int | None) -> Tensor:
        """A larger vocabulary is cut to what both have: models of one family differ in padding."""
        heat = self.view.temperature

        def judge(student_nV: Tensor, rows: slice) -> Tensor:
            teacher_nV = self.rows(rows)
            width = min(student_nV.shape[1], teacher_nV.shape[1])
            student_nV, teacher_nV = student_nV[:, :width], teacher_nV[:, :width]
            if top_k is not None:
                teacher_nV, ids_nK = teacher_nV.topk(min(top_k, width))
                student_nV = student_nV.gather(1, ids_nK)
            wide = torch.promote_types(student_nV.dtype, torch.float32)
            both = [(x.to(wide) / heat).log_softmax(-1) for x in (student_nV, teacher_nV)]
            return divergence(*both, beta)

        logits_NV = self.view.logits_NV
        return self.spread(Judged.apply(logits_NV, judge, rows_at_once(logits_NV, COPIES)))


@dataclass(frozen=True, slots=True)
class ToldTeacher:
    """A teacher known by its most likely tokens alone. Implements Teacher."""

    view: Any  # of the student's logits, dense or sharded
    ids_NK: Tensor
    logps_NK: Tensor
    spread: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls, batch: Batch, view: Any, *, own: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]
    ) -> "ToldTeacher":
        """That of the columns of a batch. `own`: [T] -> [t] of this rank, of which `view` has positions.

        A batch without columns has nothing to train, and is told of one token.
        """
        told = []
        for name, nothing in (("teacher_ids", 0), ("teacher_logps", 0.0)):
            column_TK = batch.token.get(name, batch.labels[:, None] * nothing)
            told.append(torch.stack([own(x_T) for x_T in column_TK.unbind(1)], 1)[view.positions_N])
        return cls(view, *told, spread)

    def divergence(self, beta: float, top_k: int | None) -> Tensor:
        """Both distributions are those among the first `top_k` tokens told, all by default."""
        student_NK = self.view.pick(self.ids_NK[:, :top_k]).log_softmax(-1)
        teacher_NK = self.logps_NK[:, :top_k].to(student_NK.dtype).log_softmax(-1)
        return self.spread(divergence(student_NK, teacher_NK, beta))


@dataclass(frozen=True)
class Distill(Objective):
    """GKD, arXiv:2306.13649 eq. 4, without its reward: mean divergence over the trained tokens of the step.

    `top_k` compares the teacher's most likely tokens alone, both sides made to sum to 1 over them.
    `sft_alpha` adds the likelihood of answers from the data, a mean over their tokens: segment["sampled"]
    [S] is 1 for answers of the student itself; without the column all are from the data.
    """

    beta: float = 0.5
    top_k: int | None = None
    sft_alpha: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "logps"} if self.sft_alpha else {"teacher"})

    def units(self, batch: Batch) -> dict[str, int]:
        units = {"tokens": int(batch.trained.sum())}
        return units | ({"data_tokens": int(from_data(batch).sum())} if self.sft_alpha else {})

    def __call__(self, stats: TokenStats, batch: Batch) -> LossSum:
        assert stats.teacher is not None, "Distill needs a teacher"
        apart_T = stats.teacher.divergence(self.beta, self.top_k) * batch.trained
        terms, metrics = {"tokens": apart_T.sum()}, {}
        if self.sft_alpha:
            assert stats.logps is not None
            data_T = from_data(batch)
            terms["data_tokens"] = -self.sft_alpha * (stats.logps * data_T).sum()
            metrics = {
                "divergence": weighted(apart_T, batch.trained),
                "nll_loss": weighted(-stats.logps, data_T),
            }
        return settle(LossSum(terms, metrics), batch)


def from_data(batch: Batch) -> Tensor:
    """[T] bool: trained tokens of answers that the student did not sample itself."""
    if is_filler(batch) or "sampled" not in batch.segment:
        return batch.trained
    sampled_S = column(batch, "sampled", torch.zeros(batch.num_segments, device=batch.labels.device))
    return batch.trained & (sampled_S == 0)[batch.segment_ids]
