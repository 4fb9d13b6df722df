"""A command while it runs on all nodes: its output, the first failure, and the end of all of it.

Owns: log files, what is on screen, and telling the error that came first from those that followed from it.
"""

import re
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
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
        return self.code not in (2, 130, 143)


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

    def first_error(self) -> tuple[int, str, tuple[str, ...]] | None:
        """The error that the others followed from: rank, place with its last line, the lines before."""
        ranked = []
        for (link, rank), moment in self.troubled.items():
            for who, block in _errors(list(self.kept[link, rank])):
                of = rank if rank is not None else who
                follows = AFTERMATH.search(block[-1]) is not None
                text = f"{link.host} rank {of}: {block[-1]}"
                ranked.append((follows, rank is None, moment, of, text, block))
        if not ranked:
            return None
        *_, where, text, block = min(ranked, key=lambda item: item[:3])
        return where, text, tuple(block[:-1])


def _errors(lines: list[str]) -> Iterator[tuple[int | None, list[str]]]:
    """The blocks of lines that tell of an error: tracebacks, mistakes of the user, ends by a signal."""
    for i, line in enumerate(lines):
        if line.startswith("error: "):
            yield None, [line.removeprefix("error: ")]
        elif line.startswith("Traceback "):
            end = next(
                (j for j in range(i + 1, len(lines)) if not lines[j].startswith((" ", "\t"))), len(lines) - 1
            )
            if end > i:
                yield None, lines[i : end + 1]
        elif (match := ENDED.search(line)) and int(match[2]) < 0 and match[2] not in ("-15", "-2"):
            number = -int(match[2])
            cause = " (out of memory?)" if number == signal.SIGKILL else ""
            yield int(match[1]), [f"ended by {signal.Signals(number).name}{cause}"]


@contextmanager
def heed_terminate() -> Iterator[None]:
    """SIGTERM ends a launch as Ctrl-C does, with its own exit code."""

    def terminate(*_: object) -> None:
        raise Terminate

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminate(KeyboardInterrupt):
    """SIGTERM came."""


def watch(links: list[Link], events: "Queue[tuple[Link, str, Any]]", output: Output) -> Failure | None:
    """Follows the command on all nodes to its end, None when it was a good one. Nothing runs after it."""
    codes: dict[Link, int] = {}
    try:
        with heed_terminate():
            lost = _follow(links, events, output, codes)
    except KeyboardInterrupt as interrupt:
        return _end_by_hand(links, events, output, codes, 143 if isinstance(interrupt, Terminate) else 130)
    wrong = [abs(code) for code in codes.values() if code]
    if not lost and not wrong:
        return None
    _stop(links, events, output, codes, "SIGTERM", GRACE_SECONDS)
    failure = output.first_error()
    code = 2 if 2 in wrong else next(iter(wrong), 1)
    if lost and (failure is None or AFTERMATH.search(failure[1])):
        return Failure(code, f"{lost[0].host}: {_why_lost(lost[0])}")
    if failure is None:
        return Failure(code, f"the command ended with exit code {code}; no process said why")
    rank, text, lines = failure
    return Failure(code, text, () if rank == 0 else lines, told=rank == 0 and code == 2)


def _why_lost(link: Link) -> str:
    if link.closed:
        return link.reason().message
    return f"no word for {SILENT_SECONDS:.0f} s: the machine or the network to it is down"


def _follow(
    links: list[Link], events: "Queue[tuple[Link, str, Any]]", output: Output, codes: dict[Link, int]
) -> list[Link]:
    """Until all ended, or until some seconds after the first failure. The nodes that were lost."""
    lost: list[Link] = []
    deadline = None
    while len(codes) + len(lost) < len(links):
        _take(events, output, codes, 0.5)
        now = time.monotonic()
        for link in links:
            gone = link.closed or now - link.heard > SILENT_SECONDS
            if gone and link not in codes and link not in lost:
                lost.append(link)
        if deadline is None and (lost or any(codes.values())):
            deadline = now + SETTLE_SECONDS
        if deadline is not None and now > deadline:
            break
    while _take(events, output, codes, 0.1):
        pass
    return lost


def _take(
    events: "Queue[tuple[Link, str, Any]]", output: Output, codes: dict[Link, int], seconds: float
) -> bool:
    try:
        link, kind, value = events.get(timeout=seconds)
    except Empty:
        return False
    if kind == "line":
        output.take(link, value)
    elif kind == "exit":
        codes[link] = value
    return True


def _stop(
    links: list[Link],
    events: "Queue[tuple[Link, str, Any]]",
    output: Output,
    codes: dict[Link, int],
    name: str,
    grace: float,
) -> None:
    """Ends the command where it still runs; returns when it has, or when nodes do not answer any more."""
    running = [link for link in links if link not in codes and not link.closed]
    for link in running:
        link.tell("stop", name=name, grace=grace)
    deadline = time.monotonic() + grace + SILENT_SECONDS / 2
    while time.monotonic() < deadline and any(
        link not in codes and not link.closed and time.monotonic() - link.heard < SILENT_SECONDS
        for link in running
    ):
        _take(events, output, codes, 0.2)


def _end_by_hand(
    links: list[Link],
    events: "Queue[tuple[Link, str, Any]]",
    output: Output,
    codes: dict[Link, int],
    code: int,
) -> Failure:
    """After Ctrl-C or SIGTERM: this step is finished and saved; a second time, everything is killed."""
    print("stopping after this step on all nodes; Ctrl-C once more ends at once", file=sys.stderr, flush=True)
    name = "SIGINT" if code == 130 else "SIGTERM"
    try:
        with heed_terminate():
            _stop(links, events, output, codes, name, SAVE_SECONDS)
    except KeyboardInterrupt:
        _stop(links, events, output, codes, "SIGKILL", 0.0)
    return Failure(code, "stopped by hand")
