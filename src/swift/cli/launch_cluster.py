"""Jobs of several nodes as the environment describes them: Slurm, operators on Kubernetes, and by hand.

Owns: reading Slurm's and the operators' variables, and finding contradictions in those that users set.
"""

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from swift.cli.launch_link import is_own
from swift.config.launch import LOOPBACK
from swift.config.option import ConfigError
from swift.utils import env


@dataclass(frozen=True, slots=True)
class Place:
    """This node in a job that something else has started on every node."""

    maker: str
    nodes: int
    rank: int
    master: str
    processes: str | None = None


def find_place() -> Place | None:
    """This node's place, None where nothing says that there are several."""
    return _slurm() or _operator()


def _number(*names: str) -> int | None:
    """The first of the variables that is set."""
    text = next((value for name in names if (value := env.read(name))), None)
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{names[0]}={text} is not a number")
    return int(text)


def _slurm() -> Place | None:
    listed = env.read("SLURM_STEP_NODELIST") or env.read("SLURM_JOB_NODELIST")
    nodes = _number("SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    if not listed or not nodes:
        return None
    tasks = _number("SLURM_STEP_NUM_TASKS") or nodes
    fault = None
    if nodes > 1 and env.read("SLURM_STEP_ID") is None:
        fault = f"the Slurm job has {nodes} nodes, and swift launch was started on the first of them alone"
    elif tasks != nodes:
        fault = f"srun started {tasks} tasks on {nodes} node(s): one on each starts all processes there"
    if fault:
        raise ConfigError(fault, hint="srun --ntasks-per-node=1 swift launch ...")
    return Place("Slurm", nodes, _number("SLURM_NODEID") or 0, next(expand_nodes(listed)))


def expand_nodes(listed: str) -> Iterator[str]:
    """`gpu[01-03,7],login` -> gpu01, gpu02, gpu03, gpu7, login: as Slurm writes lists of nodes."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", listed):
        head, bracket, rest = part.partition("[")
        if not bracket:
            yield part
            continue
        inner, _, tail = rest.partition("]")
        for span in inner.split(","):
            first, _, last = span.partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield from expand_nodes(f"{head}{number:0{len(first)}d}{tail}")


def _operator() -> Place | None:
    """Kubernetes operators and DLC count nodes with WORLD_SIZE and RANK, or say it to torchrun with PET_*."""
    nodes, rank = _number("PET_NNODES", "WORLD_SIZE"), _number("PET_NODE_RANK", "RANK")
    if nodes is None or rank is None or env.read("LOCAL_RANK") is not None:
        return None
    master = env.read("MASTER_ADDR")
    if master is None:
        raise ConfigError(
            f"WORLD_SIZE={nodes} and RANK={rank} are set, but MASTER_ADDR is not: where is node 0?",
            hint="set MASTER_ADDR to the address of node 0 on every node",
        )
    if rank == 0 and master.startswith(LOOPBACK):  # some operators call node 0 localhost there
        master = socket.gethostname() if nodes > 1 else master
    return Place("WORLD_SIZE and RANK", nodes, rank, master, env.read("PET_NPROC_PER_NODE"))


def enter(place: Place, *, port: int, processes: int | None) -> None:
    """Sets what torchrun is told, as users do by hand."""
    gpus = env.count_gpus()
    count = str(processes or env.read("NPROC_PER_NODE") or place.processes or max(gpus, 1))
    env.put(
        {
            "NNODES": str(place.nodes),
            "NODE_RANK": str(place.rank),
            "MASTER_ADDR": place.master,
            "MASTER_PORT": env.read("MASTER_PORT") or str(port),
            "NPROC_PER_NODE": count,
            "WORLD_SIZE": None,  # theirs count nodes, torchrun's processes
            "RANK": None,
        }
    )


def check_place() -> str | None:
    """ConfigError where the variables of this node make no job with the others; else a warning or None.

    NNODES, NODE_RANK, MASTER_ADDR as users set them. A node 0 that was not told of the others looks like one
    that is alone; the other nodes do not, by what they were told.
    """
    nodes, rank, master = _number("NNODES") or 1, _number("NODE_RANK"), env.read("MASTER_ADDR")
    together = "or start all nodes with one command: swift launch --ips ADDRESS,ADDRESS ..."
    if nodes > 1:
        if master is None or master.startswith(LOOPBACK):
            said = f"MASTER_ADDR={master}" if master else "MASTER_ADDR is not set, which means 127.0.0.1"
            raise ConfigError(
                f"{said}, with NNODES={nodes}: every node would look for node 0 on itself",
                hint=f"set it to the address of node 0, the same on every node ({own_address()}); {together}",
            )
        if rank is None or rank >= nodes:
            said = "is not set" if rank is None else f"is {rank}"
            raise ConfigError(
                f"NODE_RANK {said}, with NNODES={nodes}",
                hint=f"give every node another one of 0 to {nodes - 1}; node 0 is {master}; {together}",
            )
        return None
    alone = "this node would train alone"
    if rank:
        raise ConfigError(
            f"NODE_RANK={rank}, but NNODES is not above 1: {alone}", hint="set NNODES on every node"
        )
    if (_number("WORLD_SIZE") or 1) > 1 and env.read("NNODES") is None:
        raise ConfigError(
            f"WORLD_SIZE={env.read('WORLD_SIZE')} is set, but NNODES is not: {alone}",
            hint="NNODES=$WORLD_SIZE NODE_RANK=$RANK in front of the command, or swift launch",
        )
    if master and not master.startswith(LOOPBACK) and not is_own(master):
        raise ConfigError(
            f"MASTER_ADDR={master} is another machine, but NNODES is not set: {alone}",
            hint="set NNODES and NODE_RANK too, or unset MASTER_ADDR",
        )
    steps = _number("SLURM_STEP_NUM_NODES") or 1
    if steps > 1:
        return (
            f"srun started this on {steps} nodes, and each trains alone: swift launch makes one job of them"
        )
    return None


def own_address() -> str:
    """An address by which others may reach this machine; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation: the way out, whatever it is
            return f"this machine is {probe.getsockname()[0]}"
        except OSError:
            return "`hostname -I` shows those of a machine"
