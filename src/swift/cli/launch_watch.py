"""A command while it runs on all nodes: its output, the first failure, and the end of all of it.

Owns: log files, what is on screen, and telling the error that came first from those that followed from it.
"""

import math
import re
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from swift.cli.launch_link import Link

SILENT_SECONDS = 12.0  # without a heartbeat: a node is down, or the way to it is
SETTLE_SECONDS = 3.0  # after the first failure: the node at fault may report after one that it brought down
GRACE_SECONDS = 5.0  # from asking the others to end to killing them
SAVE_SECONDS = 600.0  # the same after Ctrl-C: the step is finished, and what is being saved
KEPT_LINES = 400
STACK_LINES = 20  # on screen, of a process that stands still
STOPPED = 130  # the exit code after Ctrl-C
RANK = re.compile(r"\[rank(\d+)\] ?(.*)", re.DOTALL)
TORCH = re.compile(r"^\[rank\d+\]: ?")  # torch puts it before lines of tracebacks
AFTERMATH = re.compile(  # what processes say whose peer is gone
    "connection (closed|reset|refused|was)|broken pipe|nccl|dist(backend|network|store)error|signalexception"
    "|sigterm|gloo|timed? ?out|heartbeat|tcpstore|recvvalue|sendbytes|keyboardinterrupt",
    re.IGNORECASE,
)
ENDED = re.compile(r"process (\d+) ended with exit code (-?\d+)")  # engines/launch.py


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ended: exit code, one line, the lines before it, and whether a restart could help."""

    code: int
    text: str
    lines: tuple[str, ...] = ()
    told: bool = False  # on screen already, among what rank 0 said

    @property
    def may_pass(self) -> bool:
        return self.code not in (2, STOPPED)


class Output:
    """Every line into the files of its node and rank and into all.log; rank 0's on screen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, IO[str]] = {}
        self.kept: dict[tuple[Link, int | None], deque[str]] = defaultdict(lambda: deque(maxlen=KEPT_LINES))
        self.troubled: dict[tuple[Link, int | None], float] = {}  # when a process first spoke of an error
        self.single = False

    def take(self, link: Link, line: str) -> None:
        match = RANK.match(line)
        rank, text = (int(match[1]), match[2]) if match else (0 if self.single else None, line)
        text = TORCH.sub("", text)
        who = f"{link.host} rank {rank}" if rank is not None else link.host
        self.write("all", f"[{who}] {text}")
        self.write(link.host, f"[rank {rank}] {text}" if rank is not None else text)
        if rank is not None:
            self.write(f"rank-{rank}", text)
        self.kept[link, rank].append(text)
        if text.startswith(("Traceback ", "error: ")) or (rank is None and ENDED.search(text)):
            self.troubled.setdefault((link, rank), time.monotonic())
        if rank == 0:
            print(text, flush=True)

    def write(self, name: str, text: str) -> None:
        if name not in self.files:
            self.files[name] = (self.folder / f"{name}.log").open("a", encoding="utf-8")
        self.files[name].write(text + "\n")
        self.files[name].flush()

    def clear(self) -> None:
        """Forgets what an earlier start said."""
        self.kept.clear()
        self.troubled.clear()

    def first_error(self) -> "Trouble | None":
        """The error that the others followed from, None when nobody spoke of one."""
        found = [
            (AFTERMATH.search(trouble.text) is not None, rank is None, moment, trouble)
            for (link, rank), moment in self.troubled.items()
            for trouble in _errors(link.host, rank, list(self.kept[link, rank]))
        ]
        return min(found, key=lambda item: item[:3])[-1] if found else None


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error of a process: one line that says where it was, and the lines before."""

    rank: int | None
    text: str
    lines: tuple[str, ...] = ()


def _errors(host: str, rank: int | None, lines: list[str]) -> Iterator[Trouble]:
    """Tracebacks, mistakes of the user, and ends by a signal among the lines of a process or a node."""
    who = host if rank is None else f"{host} rank {rank}"
    for i, line in enumerate(lines):
        if line.startswith("error: "):
            hint = next(
                (f" ({after[6:]})" for after in lines[i + 1 : i + 2] if after.startswith("hint: ")), ""
            )
            yield Trouble(rank, f"{who}: {line[7:]}{hint}")
        elif line.startswith("Traceback "):
            end = next((j for j in range(i + 1, len(lines)) if not lines[j].startswith((" ", "\t"))), None)
            if end is not None:
                yield Trouble(rank, f"{who}: {lines[end]}", tuple(lines[i:end]))
        elif (match := ENDED.search(line)) and int(match[2]) < 0 and match[2] not in ("-15", "-2"):
            name = signal.Signals(-int(match[2])).name
            cause = " (out of memory?)" if name == "SIGKILL" else ""
            yield Trouble(int(match[1]), f"{host} rank {match[1]}: ended by {name}{cause}")


class Watch:
    """A command on all nodes, from its start to its end."""

    def __init__(self, links: list[Link], events: "Queue[tuple[Link, str, Any]]", output: Output) -> None:
        self.links, self.events, self.output = links, events, output
        self.codes: dict[Link, int] = {}  # of the nodes where it has ended, in that order
        self.lost: dict[Link, str] = {}  # and why
        self.hung: list[tuple[bool, float, Trouble]] = []  # of each whether it still ran, and since when

    def follow(self) -> Failure | None:
        """Follows it to its end, None when it was a good one. Nothing runs after it."""
        try:
            self._await_end()
        except KeyboardInterrupt:
            return self._end_by_hand()
        wrong = [abs(code) for code in self.codes.values() if code]
        if not self.lost and not wrong and not self.hung:
            return None
        self._stop("SIGTERM", GRACE_SECONDS)
        if self.hung:
            trouble = min(self.hung, key=lambda item: item[:2])[-1]
            return Failure(1, trouble.text, trouble.lines)
        error = self.output.first_error()
        code = 2 if 2 in wrong else next(iter(wrong), 1)
        if self.lost and (error is None or AFTERMATH.search(error.text)):
            link, why = next(iter(self.lost.items()))
            return Failure(code, f"{link.host}: {why}")
        if error is None:
            return Failure(code, f"the command ended with exit code {code}; no process said why")
        on_screen = error.rank == 0
        return Failure(code, error.text, () if on_screen else error.lines, told=on_screen and code == 2)

    def _await_end(self) -> None:
        """Until all ended, or until some seconds after the first failure."""
        deadline = math.inf
        while len(self.codes) + len(self.lost) < len(self.links) and time.monotonic() < deadline:
            self._take(0.5)
            now = time.monotonic()
            for link in self.links:
                gone = link.closed or now - link.heard > SILENT_SECONDS
                if gone and link not in self.codes and link not in self.lost:
                    self.lost[link] = _why_lost(link)
            if self.lost or self.hung or any(self.codes.values()):
                deadline = min(deadline, now + SETTLE_SECONDS)
        end = time.monotonic() + 1.0  # for what is on its way; a node that still runs may never be silent
        while time.monotonic() < end and self._take(0.1):
            pass

    def _take(self, seconds: float) -> bool:
        try:
            link, kind, value = self.events.get(timeout=seconds)
        except Empty:
            return False
        if kind == "line":
            self.output.take(link, value)
        elif kind == "exit":
            self.codes[link] = value
        elif kind == "hang":
            for rank, seconds, phase, state, stacks in value:
                for line in stacks.splitlines():
                    self.output.take(link, f"[rank{rank}] {line}")
                how = " (the process is stopped)" if state == "T" else ""
                text = f"{link.host} rank {rank}: no progress for {seconds} s in {phase}{how}"
                trouble = Trouble(rank, text, tuple(stacks.splitlines()[:STACK_LINES]))
                self.hung.append((state != "T", -seconds, trouble))
        return True

    def _running(self) -> list[Link]:
        now = time.monotonic()
        alive = [link for link in self.links if not link.closed and now - link.heard < SILENT_SECONDS]
        return [link for link in alive if link not in self.codes]

    def _stop(self, name: str, grace: float) -> None:
        """Ends it where it still runs; returns when it has, or when nodes do not answer any more."""
        for link in self._running():
            link.tell("stop", name=name, grace=grace)
        deadline = time.monotonic() + grace + SILENT_SECONDS / 2
        while self._running() and time.monotonic() < deadline:
            self._take(0.2)

    def _end_by_hand(self) -> Failure:
        """After Ctrl-C: this step is finished and saved; after another one, everything is killed."""
        said = "stopping after this step on all nodes; Ctrl-C once more ends at once"
        print(said, file=sys.stderr, flush=True)
        try:
            self._stop("SIGINT", SAVE_SECONDS)
        except KeyboardInterrupt:
            self._stop("SIGKILL", 0.0)
        return Failure(STOPPED, "stopped by hand")


def _why_lost(link: Link) -> str:
    if link.closed:
        return link.reason().message
    return f"no word for {SILENT_SECONDS:.0f} s: the machine or the network to it is down"
