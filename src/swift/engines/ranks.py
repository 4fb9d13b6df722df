"""Processes of one job: who this one is, and the few things that all of them do together.

Owns: the process group and every exchange of plain values. Not here: gradients and weights (wrap.py).
With one process nothing below touches torch.distributed, so loops need no second path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from swift.utils import env

Value = TypeVar("Value")


@dataclass(slots=True)
class Flags:
    """Bits that processes raise for each other; they travel with every exchange of numbers."""

    mine: int = 0
    agreed: int = 0  # of all processes, as of the last exchange


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others. Methods are called by all of them, in the same order, but for `flag`."""

    rank: int = 0
    world: int = 1
    flags: Flags = field(default_factory=Flags, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def flag(self, bit: int) -> None:
        """Raises a flag that all ranks see after the next exchange. From any thread of any rank."""
        self.flags.mine |= bit

    def flagged(self) -> int:
        """The flags of all ranks. Equal on each of them when asked at the same point of the program."""
        return self.flags.mine if self.world == 1 else self.flags.agreed

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def share(self, value: Value, source: int = 0) -> Value:
        """Rank `source`'s value, on every rank; anything that can be pickled."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=source)
        shared: Value = box[0]
        return shared

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank; all ranks give equally many. float64, so sums stay exact."""
        mine = torch.tensor([*numbers, self.flags.mine], dtype=torch.float64)
        if self.world == 1:
            return [mine.tolist()[:-1]]
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        rows = [part.tolist() for part in parts]
        for row in rows:
            self.flags.agreed |= int(row.pop())
        return rows

    def collect(self, value: Value) -> list[Value]:
        """The value of every rank, by rank; anything that can be pickled."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, (value, self.flags.mine))
        for _, flags in boxes:
            self.flags.agreed |= flags
        return [value for value, _ in boxes]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over ranks, added in the order of ranks: the same on each of them."""
        return [sum(column) for column in zip(*self.gather(numbers), strict=True)]


def join_ranks(device: torch.device, timeout_seconds: int) -> tuple[Ranks, torch.device]:
    """Joins the job that torchrun started, if there is one; the device of this process."""
    world, rank = int(env.read("WORLD_SIZE", "1") or 1), int(env.read("RANK", "0") or 0)
    if world == 1:
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(env.read("LOCAL_RANK", "0") or 0))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return Ranks(rank, world), device


def leave_ranks() -> None:
    """Ends the process group; nothing when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
