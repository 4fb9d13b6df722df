"""One sum over the nodes of a launch, before anything is loaded: `python -m swift.engines.reduction`.

Joins the job of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT with gloo, and with nccl where there is a GPU.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 60


def check_reduction() -> bool:
    """Whether the sum of ones is the number of processes, on every device that training would use."""
    backends = {"cpu": "gloo", "cuda": "nccl"} if torch.cuda.is_available() else {"cpu": "gloo"}
    names = ",".join(f"{device}:{backend}" for device, backend in backends.items())
    dist.init_process_group(names, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    sums = [torch.ones(1, device=device) for device in backends]
    for number in sums:
        dist.all_reduce(number)
    right = all(number.item() == dist.get_world_size() for number in sums)
    dist.destroy_process_group()
    return right


if __name__ == "__main__":
    sys.exit(0 if check_reduction() else 1)
