"""What engines do differently before the loop: where the model is, who the processes are, what is built."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swift.engines.protocol import Engine
from swift.engines.ranks import Ranks, join_ranks
from swift.models.load import pick_device
from swift.train.actor_critic import build_engines
from swift.train.preparing import Locate, Prepared, locate_model


@dataclass(frozen=True)
class Backend:
    """One kind of engine, as a run needs it."""

    settle: Callable[[Any], Any]  # a run, once it is whole
    locate: Locate
    join: Callable[[Prepared], tuple[Ranks, torch.device]]
    build: Callable[[Prepared, Ranks, torch.device, int, int], Engine]  # steps in all, accumulation
    iterations: bool = False  # whether checkpoints have a part for Megatron's tools
    # After the last step, in one process, with the last checkpoint.
    finish: Callable[[Any, Path], None] = lambda _run, _checkpoint: None


def join_data_parallel(ready: Prepared) -> tuple[Ranks, torch.device]:
    """Every process has rows of its own, or shares those of its sequence group."""
    run = ready.run
    return join_ranks(
        pick_device(run.model.device),
        run.parallel.ddp_timeout,
        sequence_size=run.parallel.sequence_parallel_size,
        backend=run.parallel.ddp_backend,
    )


TRANSFORMERS = Backend(lambda run: run, locate_model, join_data_parallel, build_engines)
