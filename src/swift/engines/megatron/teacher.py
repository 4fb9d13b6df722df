"""A teacher that is cut over ranks as the model is, for objectives that compare the two.

Only what enters its output layer is kept of it: logits are made when they are asked for, some rows at a time.
Shapes: N = tokens with logits, n = some of N, K = the teacher's most likely tokens, v = this rank's columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from swift.engines.megatron.logits import Normalised, ShardedLogits
from swift.objectives.distill import COPIES, divergence
from swift.objectives.logits import CHUNK_BYTES, Judged, widen

Rows = Callable[[slice], Tensor]  # of N -> the teacher's logits there, [n, v]


def rows_of(chunk: GPTModel) -> Rows:
    """The teacher's logits of the batch that its last chunk has just seen."""
    layer, hidden_ND = chunk.output_layer, chunk.kept.entered[:, 0]
    tied = chunk.share_embeddings_and_output_weights
    weight_vD = (chunk.shared_embedding_or_output_weight() if tied else layer.weight).detach()
    return lambda rows: F.linear(hidden_ND[rows], weight_vD)


@dataclass(frozen=True, slots=True)
class ShardedTeacher:
    """A teacher that has been run beside the model. Implements `swift.objectives.types.Teacher`."""

    view: ShardedLogits  # of the student
    rows: Rows
    spread: Callable[[Tensor], Tensor]  # [N] -> [T] of the whole batch

    def divergence(self, beta: float, top_k: int | None) -> Tensor:
        view, heat = self.view, self.view.temperature

        def judge(student_nv: Tensor, rows: slice) -> Tensor:
            teacher_nv = self.rows(rows)
            width = min(student_nv.shape[1], teacher_nv.shape[1])
            student_nv, teacher_nv = student_nv[:, :width], teacher_nv[:, :width]
            if top_k is None:
                both = [self._log_softmax(x) for x in (student_nv, teacher_nv)]
                return reduce_from_tensor_model_parallel_region(divergence(*both, beta))
            teacher_nK, ids_nK = self._lead(teacher_nv, top_k)
            student_nK = replace(view, logits_Nv=student_nv).pick(ids_nK)
            return divergence(student_nK.log_softmax(-1), (widen(teacher_nK) / heat).log_softmax(-1), beta)

        # Judging exchanges: all tensor ranks take as many rows at a time, whatever columns they have.
        columns = -(-view.vocabulary // dist.get_world_size(view.group))
        count = max(CHUNK_BYTES // (4 * COPIES * columns), 1)
        return self.spread(Judged.apply(view.logits_Nv, judge, count))

    def _log_softmax(self, logits_nv: Tensor) -> Tensor:
        """[n, v] over all of the vocabulary."""
        nowhere_n = logits_nv.new_full((len(logits_nv),), -1, dtype=torch.int64)
        _, normaliser_n = Normalised.apply(logits_nv, nowhere_n, self.view.group, self.view.temperature)
        normaliser_n = copy_to_tensor_model_parallel_region(normaliser_n)
        return widen(logits_nv) / self.view.temperature - normaliser_n[:, None]

    def _lead(self, logits_nv: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """[n, K] highest logits over all of the vocabulary, and their ids."""
        group, top_k = self.view.group, min(top_k, self.view.vocabulary)
        highest, at = logits_nv.topk(min(top_k, logits_nv.shape[1]))
        missing = (0, top_k - highest.shape[1])
        mine = F.pad(highest, missing, value=-torch.inf), F.pad(at + self.view.first, missing)
        parts = [[torch.empty_like(x) for _ in range(dist.get_world_size(group))] for x in mine]
        for into, x in zip(parts, mine, strict=True):
            dist.all_gather(into, x.contiguous(), group=group)
        values, ids = (torch.cat(into, -1) for into in parts)
        found, places = values.topk(top_k)
        return found, ids.gather(1, places)
