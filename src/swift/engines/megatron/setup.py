"""The process groups of megatron-core, and who each process is among them."""

from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from swift.config.layout import Layout
from swift.engines.megatron.context import ContextRanks
from swift.engines.ranks import Ranks


def join_model_parallel(ranks: Ranks, degrees: Layout, timeout_seconds: int) -> Ranks:
    """Splits the job's processes by `degrees`; `ranks` with what each of them is to the data.

    The last pipeline stage speaks for its data rank: it alone knows losses. Called by all processes of the
    job; a single process becomes a job of its own.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=timeout_seconds)
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=degrees.tensor,
        pipeline_model_parallel_size=degrees.pipeline,
        virtual_pipeline_model_parallel_size=degrees.virtual,
        context_parallel_size=degrees.context,
        expert_model_parallel_size=degrees.expert,
        expert_tensor_parallel_size=degrees.expert_tensor,
        distributed_timeout_minutes=max(timeout_seconds // 60, 1),
    )
    data_rank = parallel_state.get_data_parallel_rank()
    speaks = (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )
    told = sorted(
        (their_data, rank)
        for rank, (their_data, speaks) in enumerate(ranks.collect((data_rank, speaks)))
        if speaks
    )
    return replace(ranks, data_rank=data_rank, speakers=tuple(rank for _, rank in told))


def context_ranks(kind: str) -> ContextRanks:
    """This process among those that share its batches; `kind` as --cp_comm_type says."""
    size = parallel_state.get_context_parallel_world_size()
    assert kind in ("all_gather", "a2a")
    return ContextRanks(
        parallel_state.get_context_parallel_rank(), size, parallel_state.get_context_parallel_group(), kind
    )


def seed_model_parallel(seed: int) -> None:
    """Random states: equal where ranks hold copies of an activation, different where they hold parts."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    torch.manual_seed(seed + 100 * stage + 10_000 * data_rank)
    model_parallel_cuda_manual_seed(seed + 10_000 * data_rank)


def leave_model_parallel() -> None:
    """The inverse of `join_model_parallel`, but for the job itself."""
    parallel_state.destroy_model_parallel()
