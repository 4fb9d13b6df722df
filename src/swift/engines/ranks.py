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

from swift.config.option import ConfigError
from swift.utils import env
from swift.utils.bound import end_with_parent

Value = TypeVar("Value")


@dataclass(slots=True)
class Flags:
    """Bits that processes raise for each other; they travel with every exchange of numbers."""

    mine: int = 0
    agreed: int = 0  # of all processes, as of the last exchange


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others. Methods are called by all of them, in the same order, but for `flag`.

    Ranks that share their rows, and split the tokens or the model among them, are one data rank. `speakers`
    are those whose numbers count: one for each data rank, in their order.
    """

    rank: int = 0
    world: int = 1
    data_rank: int = 0
    speakers: tuple[int, ...] = (0,)
    sequence_size: int = 1  # neighbours that share the tokens of a row
    sequence_group: dist.ProcessGroup | None = None
    flags: Flags = field(default_factory=Flags, compare=False)

    @property
    def data_world(self) -> int:
        return len(self.speakers)

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
        """The numbers of every data rank; all give equally many. float64, so sums stay exact."""
        mine = torch.tensor([*numbers, self.flags.mine], dtype=torch.float64)
        if self.world == 1:
            return [mine.tolist()[:-1]]
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        rows = [part.tolist() for part in parts]
        for row in rows:
            self.flags.agreed |= int(row.pop())
        return [rows[speaker] for speaker in self.speakers]

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
        """Sums over data ranks, added in their order: the same on each of them."""
        return [sum(column) for column in zip(*self.gather(numbers), strict=True)]


def join_ranks(
    device: torch.device, timeout_seconds: int, *, sequence_size: int = 1, backend: str | None = None
) -> tuple[Ranks, torch.device]:
    """Joins the job that torchrun started, if there is one; the device of this process.

    `backend` of exchanges between GPUs, None = nccl. Raises ConfigError where `sequence_size` does not divide
    the processes.
    """
    world, rank = int(env.read("WORLD_SIZE", "1") or 1), int(env.read("RANK", "0") or 0)
    if world % sequence_size:
        raise ConfigError(
            f"--sequence_parallel_size {sequence_size} does not divide the {world} process(es)",
            hint="set NPROC_PER_NODE (times NNODES) to a multiple of it",
        )
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError("--ddp_backend nccl needs GPUs", hint="leave it out: the CPU uses gloo")
    if world == 1:
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(env.read("LOCAL_RANK", "0") or 0))
        torch.cuda.set_device(device)
    if env.read("TORCHELASTIC_RUN_ID"):  # ranks that nobody watches would go on, and write where others do
        end_with_parent()
    if not dist.is_initialized():
        backends = f"cpu:gloo,cuda:{backend or 'nccl'}" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=timedelta(seconds=timeout_seconds))
    group = dist.new_subgroups(sequence_size)[0] if sequence_size > 1 else None
    speakers = tuple(range(0, world, sequence_size))
    return Ranks(rank, world, rank // sequence_size, speakers, sequence_size, group), device


@dataclass(frozen=True, slots=True)
class Peers:
    """The processes with the rows of this one. What they exchange crosses nothing else: in any thread."""

    place: int  # of this process among them
    count: int
    group: dist.ProcessGroup

    def collect(self, value: Value) -> list[Value]:
        """The value of every peer, in their order; anything that can be pickled."""
        boxes: list[Any] = [None] * self.count
        dist.all_gather_object(boxes, value, group=self.group)
        return boxes


def join_peers(ranks: Ranks) -> Peers:
    """Called by all ranks."""
    every = ranks.collect(ranks.data_rank)
    groups = [[r for r, other in enumerate(every) if other == data] for data in range(ranks.data_world)]
    group, _ = dist.new_subgroups_by_enumeration(groups, backend="gloo")
    mine = groups[ranks.data_rank]
    return Peers(mine.index(ranks.rank), len(mine), group)


def leave_ranks() -> None:
    """Ends the process group; nothing when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
