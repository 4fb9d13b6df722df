"""Runs in every rank of a job: a teacher cut over tensor ranks, for test_megatron_teacher.py."""

import torch
import torch.distributed as dist

from swift.config.layout import Layout
from swift.engines.megatron import teacher
from swift.engines.megatron.logits import ShardedLogits
from swift.engines.megatron.setup import join_model_parallel
from swift.engines.megatron.teacher import ShardedTeacher
from swift.engines.ranks import Ranks
from swift.objectives.distill import LocalTeacher
from swift.objectives.logits import DenseLogits

ROWS, VOCABULARY, HEAT = 7, 33, 0.7


def compare(rank: int, world: int) -> None:
    """The hook: divergences and gradients are those of whole logits, a few rows at a time."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    join_model_parallel(Ranks(rank, world), Layout(world=world, tensor=world), 60)
    width = -(-VOCABULARY // world)  # the last rank has a column of padding
    teacher.CHUNK_BYTES = 4 * teacher.COPIES * width * 2
    generator = torch.Generator().manual_seed(1)
    student, other, weight = (
        torch.randn(ROWS, count, generator=generator, dtype=torch.float64) for count in (33, 33, 1)
    )
    positions = torch.arange(ROWS)
    padded = [torch.nn.functional.pad(x, (0, width * world - VOCABULARY)) for x in (student, other)]
    mine = [x[:, rank * width : (rank + 1) * width].clone() for x in padded]
    for beta in (0.0, 0.3, 1.0):
        for top_k in (None, 1, 5, 30):
            whole, own = student.clone().requires_grad_(), mine[0].clone().requires_grad_()
            dense = LocalTeacher(DenseLogits(whole, positions, HEAT), other.__getitem__, lambda x: x)
            view = ShardedLogits.cut(own, positions, VOCABULARY, HEAT)
            cut = ShardedTeacher(view, mine[1].__getitem__, lambda x: x)
            expected, found = (one.divergence(beta, top_k) for one in (dense, cut))
            torch.testing.assert_close(found, expected)
            for value in (expected, found):
                (value * weight[:, 0]).sum().backward()
            gradient = torch.nn.functional.pad(whole.grad, (0, width * world - VOCABULARY))
            torch.testing.assert_close(own.grad, gradient[:, rank * width : (rank + 1) * width])
            assert expected.abs().max() > 0.1 or top_k == 1
