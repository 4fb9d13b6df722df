"""What runs in every rank of a job on megatron-core: cases that differ in their layouts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from swift.config.layout import Layout
from swift.engines.megatron.setup import join_model_parallel, leave_model_parallel
from swift.engines.ranks import Ranks


def run_each(
    rank: int,
    world: int,
    cases: list[dict[str, Any]],
    run_case: Callable[[Ranks, Layout, dict[str, Any]], None],
) -> None:
    """Every case on the same processes, one after the other."""
    torch.set_num_threads(1)
    for case in cases:
        layout = Layout(world=world, **case["degrees"])
        if not dist.is_initialized() and world > 1:
            dist.init_process_group("gloo")
        ranks = join_model_parallel(Ranks(rank, world), layout, 60)
        try:
            run_case(ranks, layout, case)
        finally:
            leave_model_parallel()
