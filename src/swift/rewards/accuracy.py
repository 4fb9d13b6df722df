"""Rewards that compare an answer with the column `solution`, by mathematics instead of letters.

math-verify parses what a model wrote with a computer algebra system: that may take for ever, and its own
time-outs need the main thread of a process. So it runs in worker processes, which are killed when they hang.
"""

import logging
import math
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from math_verify import parse, verify

from swift.plugins.hooks import ORM
from swift.utils.log import warn

WORKERS = 2
COMPUTE_SECONDS = 2.0  # of processor time for one answer, which takes milliseconds: load must not matter
PAIR_SECONDS = 20.0  # for one answer, before its worker is killed: a single operation may not end either
START_SECONDS = 120.0  # a worker imports the algebra system first, on a machine that may be busy
BATCH_SECONDS = 120.0  # for all answers of a call
MEMORY_BYTES = 4 << 30  # address space of a worker: 10^10^10 written out would take more
MAX_CHARACTERS = 20_000  # the end of an answer counts
KEPT = 4096  # verdicts remembered: accuracy and cosine ask the same

_MARK = re.compile(r"\$|\\boxed|\\\(|\\\[")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2}")

Pair = tuple[str, str]


def find_answer(completion: str) -> str:
    """What is judged of a completion: its last `<answer>`, else what comes after its thoughts."""
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:
        return ""  # cut off while it was thinking
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (answers[-1] if answers else text).strip()[-MAX_CHARACTERS:]


def is_equal(answer: str, solution: str) -> bool:
    """Whether an answer has the value of the solution; as text where the solution is no mathematics."""
    if answer == solution:
        return True
    gold = _read(solution)
    return bool(gold) and verify(gold, _read(answer), timeout_seconds=None)


def _read(text: str) -> list[Any]:
    """The expressions of a text. One that is a formula and nothing else needs no mark that says so."""
    is_bare = len(text) < 200 and not _MARK.search(text) and not _WORD.search(_COMMAND.sub("", text))
    found = parse(f"${text}$", parsing_timeout=None) if is_bare else []
    return found or parse(text, parsing_timeout=None)


class _TooLongError(BaseException):
    """No Exception, because math-verify goes on after every Exception."""


def _give_up(*_: object) -> None:
    raise _TooLongError


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def serve(file: int) -> None:
    """A worker: answers pairs until the pipe, of which it has the number, is closed."""
    pipe = Connection(file)
    logging.disable()  # math-verify warns that nobody limits it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that started this one
    signal.signal(signal.SIGPROF, _give_up)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    is_equal(r"\boxed{\frac12}", "0.5")  # what it imports late
    pipe.send(None)
    while True:
        try:
            pair = pipe.recv()
        except (EOFError, ConnectionResetError):  # the process that started this one has ended, or was killed
            return
        _limit(resource.RLIMIT_CPU, int(time.process_time() + PAIR_SECONDS))  # if nobody is left to kill it
        try:
            signal.setitimer(signal.ITIMER_PROF, COMPUTE_SECONDS)
            verdict = is_equal(*pair)
        except (Exception, _TooLongError):  # whatever a text does to an algebra system, it is no solution
            verdict = False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(verdict)


class _Worker:
    """A process and what it is at: starting, a pair, or nothing."""

    def __init__(self) -> None:
        # No fork: it would have torch's threads, and a GPU. No multiprocessing: it runs the main file again.
        self.pipe, theirs = Pipe()
        code = f"import sys; sys.path[:] = {sys.path}; from {__name__} import serve; serve({theirs.fileno()})"
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        self.pair: Pair | None = None
        self.is_free = False
        self.deadline = time.monotonic() + START_SECONDS

    def take(self, pair: Pair, seconds: float) -> None:
        self.pair, self.is_free, self.deadline = pair, False, time.monotonic() + seconds
        with suppress(ConnectionError):  # it has died, which `answer` will find
            self.pipe.send(pair)

    def answer(self, is_done: bool) -> bool | None:
        """The verdict on its pair; False when it is late or dead. None = there is nothing to tell yet."""
        if not is_done and time.monotonic() < self.deadline:
            return None
        try:
            verdict = is_done and bool(self.pipe.recv())
            self.is_free = is_done
        except (EOFError, ConnectionError):
            verdict = False
        assert self.is_free or self.pair, "a process of math-verify did not start"
        return verdict

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Graders:
    """Worker processes that stay, each with one pair at a time."""

    def __init__(self, count: int = WORKERS, *, pair_seconds: float = PAIR_SECONDS) -> None:
        self.pair_seconds = pair_seconds
        self.killed = 0  # workers that took too long, or died
        self._known: dict[Pair, bool] = {}
        self._lock = threading.Lock()
        self._workers = [_Worker() for _ in range(count)]

    def grade(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether each answer equals its solution, for (answer, solution). What takes too long does not."""
        with self._lock:
            if len(self._known) > KEPT:
                self._known.clear()
            todo = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
            self._known |= self._run(deque(todo))
            return [self._known[pair] for pair in pairs]

    def _run(self, waiting: deque[Pair]) -> dict[Pair, bool]:
        verdicts: dict[Pair, bool] = {}
        end = time.monotonic() + BATCH_SECONDS
        while waiting or any(worker.pair for worker in self._workers):
            for worker in self._workers:
                if worker.is_free and waiting:
                    worker.take(waiting.popleft(), self.pair_seconds)
            busy = [worker for worker in self._workers if not worker.is_free]
            patience = min(worker.deadline for worker in busy) - time.monotonic()
            done = wait([worker.pipe for worker in busy], max(patience, 0.0))
            for worker in busy:
                verdict = worker.answer(worker.pipe in done)
                if verdict is None:
                    continue
                if worker.pair:
                    verdicts[worker.pair], worker.pair = verdict, None
                if not worker.is_free:
                    worker.kill()
                    self.killed += 1
                    self._workers[self._workers.index(worker)] = _Worker()
            if waiting and verdicts and time.monotonic() > end:
                warn(f"{len(waiting)} answers count as wrong: judging the others took {BATCH_SECONDS:.0f} s")
                verdicts |= dict.fromkeys(waiting, False)
                waiting.clear()
        return verdicts

    def close(self) -> None:
        """Ends the processes; they would end with this one, too."""
        for worker in self._workers:
            worker.kill()


@cache
def graders() -> Graders:
    """Those of this process; they start while the model is loaded."""
    return Graders()


def grade_column(completions: Sequence[str], solutions: Sequence[Any]) -> list[bool | None]:
    """Whether each completion gives its solution; None where the row has none."""
    pairs = [
        (find_answer(text), str(solution).strip())
        for text, solution in zip(completions, solutions, strict=True)
        if solution is not None
    ]
    verdicts = iter(graders().grade(pairs))
    return [None if solution is None else next(verdicts) for solution in solutions]


class MathAccuracy(ORM):
    """1 where the answer equals the column `solution`, else 0."""

    def __init__(self) -> None:
        graders()

    def __call__(self, completions: list[str], solution: list[Any], **_columns: Any) -> list[float | None]:
        return [None if right is None else float(right) for right in grade_column(completions, solution)]


class MathSection(MathAccuracy):
    """As accuracy, but of an answer or a solution with a line `# Answer` what comes behind the last one."""

    def __call__(self, completions: list[str], solution: list[Any], **_columns: Any) -> list[float | None]:
        right = [None if text is None else str(text).rpartition("# Answer")[2] for text in solution]
        return MathAccuracy.__call__(self, [text.rpartition("# Answer")[2] for text in completions], right)


class CosineReward(ORM):
    """From the value of a short answer to that of a long one along half a cosine.

    Source: arXiv:2502.03373; answers beyond `cosine_max_len` keep its value.
    """

    def __init__(
        self,
        cosine_max_len: int,
        cosine_min_len_value_correct: float = 1.0,
        cosine_max_len_value_correct: float = 0.5,
        cosine_min_len_value_wrong: float = -0.5,
        cosine_max_len_value_wrong: float = 0.0,
    ) -> None:
        graders()
        self.longest = cosine_max_len
        self.ends = {  # whether it is right -> value of the shortest and of the longest answer
            True: (cosine_min_len_value_correct, cosine_max_len_value_correct),
            False: (cosine_min_len_value_wrong, cosine_max_len_value_wrong),
        }

    def __call__(
        self,
        completions: list[str],
        solution: list[Any],
        response_token_ids: Sequence[Sequence[int]],
        **_columns: Any,
    ) -> list[float | None]:
        return [
            None if right is None else self._value(right, len(ids))
            for right, ids in zip(grade_column(completions, solution), response_token_ids, strict=True)
        ]

    def _value(self, right: bool, length: int) -> float:
        short, long = self.ends[right]
        share = min(length / self.longest, 1.0)
        return short + (long - short) * (1 - math.cos(share * math.pi)) / 2
