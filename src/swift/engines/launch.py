"""Starts a command again as several processes, through torchrun's own agent.

NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT mean what torchrun's flags of those names mean.
"""

import logging
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from swift.utils import env
from swift.utils.log import say

FORWARDED = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
MODULES = {"swift": "swift", "megatron": "swift.cli.megatron"}  # behind `python -m`, by command
SHUTDOWN_SECONDS = "600"  # from passing on SIGTERM to SIGKILL


def launch_on_gpus(program: str, argv: Sequence[str]) -> int | None:
    """`launch` with one process for each GPU that torch sees; None where that would be one."""
    count = torch.cuda.device_count()
    if count < 2:
        return None
    say(f"training on all {count} GPUs, each with rows of its own; NPROC_PER_NODE takes fewer")
    env.set_defaults({"NPROC_PER_NODE": str(count)})
    return launch(program, argv)


def launch(program: str, argv: Sequence[str]) -> int:
    """`program argv...` in every process of this node; the exit code of the first that failed."""
    options = [f"--{name.lower()}={value}" for name in FORWARDED if (value := env.read(name))]
    if not env.read("MASTER_PORT") and env.read("NNODES", "1") == "1":
        options.append("--standalone")  # a free port, so that two jobs on one machine do not meet
    # torchrun sets the first with a warning of five lines, and would kill after 30 s what is being saved.
    env.set_defaults({"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_SECONDS})
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args([*options, "-m", MODULES[program], *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != 2:  # 2 is a mistake that the process itself has told in words
            say(
                f"process {rank} ended with exit code {failure.exitcode}; the others were stopped",
                style="red",
            )
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
