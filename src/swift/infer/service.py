"""One thread that computes, and an event loop that asks it: requests in, tokens out, fairly between models.

Owns: the thread, who waits and who runs, the numbers of /metrics. Every decoder with something to do takes
one step in turn, so that no model waits for another's long answers.
Not here: what is decoded (rollout/decoder.py), HTTP (server.py).
"""

import asyncio
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from swift.rollout.decoder import Decoder, Ticket
from swift.rollout.types import End, Request, Token

Event = Token | End


class Busy(Exception):
    """More is asked for than may wait."""


class Closing(Exception):
    """Nothing is taken any more, or an answer was ended for that reason."""


@dataclass(eq=False, slots=True)
class Job:
    """The answers to one request as they come. It belongs to the event loop, but for `tickets`."""

    model: str
    requests: Sequence[Request]  # one for each prompt
    events: asyncio.Queue[tuple[int, Event | None]] = field(default_factory=asyncio.Queue)
    started: set[int] = field(default_factory=set)  # answers that have a token
    num_done: int = 0
    is_wanted: bool = True
    began: float = field(default_factory=time.monotonic)
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many answers it wants; those to one prompt follow each other."""
        return sum(request.count for request in self.requests)

    async def next(self) -> tuple[int, Event]:
        """Number of the answer, and its next token or its end. Raises Closing when no more will come."""
        index, event = await self.events.get()
        if event is None or (isinstance(event, End) and event.completion.finish_reason == "abort"):
            raise Closing
        return index, event


@dataclass(eq=False)
class Service:
    """Runs on the event loop that creates it, with a thread of its own.

    `limit`: answers that may run and wait together. `activate(model)` comes before steps of another model.
    `fail(error)` is told when a step went wrong: every job is closed then, and nothing is taken any more.
    """

    decoders: Mapping[str, Decoder]
    limit: int
    activate: Callable[[str], None]
    fail: Callable[[BaseException], None]
    is_open: bool = True
    jobs: set[Job] = field(default_factory=set)
    totals: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _inbox: queue.SimpleQueue[Callable[[], None] | None] = field(default_factory=queue.SimpleQueue)
    _outbox: list[tuple[Job, int, Event | None]] = field(default_factory=list)
    _busy: set[str] = field(default_factory=set)
    _active: str = ""

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    # On the event loop:

    @property
    def num_running(self) -> int:
        """Answers that have begun and not ended."""
        return sum(len(job.started) - job.num_done for job in self.jobs)

    @property
    def num_waiting(self) -> int:
        """Answers that have no token yet."""
        return sum(job.count - len(job.started) for job in self.jobs)

    def submit(self, model: str, requests: Sequence[Request]) -> Job:
        """Asks for answers. Raises Busy or Closing."""
        if not self.is_open:
            raise Closing
        job = Job(model, requests)
        if self.num_running + self.num_waiting + job.count > self.limit:
            self.totals["requests_refused"] += 1
            raise Busy
        self.jobs.add(job)
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += sum(len(request.token_ids) for request in requests)
        self._inbox.put(partial(self._start, job))
        return job

    def cancel(self, job: Job) -> None:
        """Frees what a job holds; its `next` raises Closing. Nothing happens to one that has ended."""
        if job in self.jobs:
            job.is_wanted = False
            self._inbox.put(partial(self._stop, job))

    def drain(self, grace_seconds: float) -> None:
        """Takes nothing more, and ends what still runs after a while. Also for handlers of signals."""
        self.is_open = False
        self._loop.call_soon_threadsafe(self._loop.call_later, grace_seconds, self._cancel_all)

    def close(self) -> None:
        """Ends the thread, after its step."""
        self._inbox.put(None)
        self._thread.join()

    def _cancel_all(self) -> None:
        for job in self.jobs:
            self.cancel(job)

    def _deliver(self, outbox: list[tuple[Job, int, Event | None]]) -> None:
        now = time.monotonic()
        for job, index, event in outbox:
            if job not in self.jobs:
                continue
            if isinstance(event, Token):
                self.totals["generated_tokens"] += 1
                if not job.started:
                    self.totals["first_tokens"] += 1
                    self.totals["first_token_seconds"] += now - job.began
                job.started.add(index)
            elif event is not None:
                job.started.add(index)
                job.num_done += 1
            if event is None or job.num_done == job.count:
                self.totals["requests_answered" if job.is_wanted else "requests_cancelled"] += 1
                self.totals["request_seconds"] += now - job.began
                self.jobs.remove(job)
            job.events.put_nowait((index, event))

    def _give_up(self, error: BaseException) -> None:
        self.is_open = False
        self._deliver([(job, 0, None) for job in self.jobs])
        self.fail(error)

    # On the thread:

    def _work(self) -> None:
        try:
            while self._take():
                for model in sorted(self._busy):
                    if model != self._active:
                        self.activate(model)
                        self._active = model
                    if not self.decoders[model].step():
                        self._busy.discard(model)
                self._publish()
        except BaseException as error:  # told to whoever waits; the command raises it again
            self._loop.call_soon_threadsafe(self._give_up, error)

    def _take(self) -> bool:
        """Does what was asked for; waits for that when there is nothing to compute. False = end."""
        while True:
            try:
                action = self._inbox.get(block=not self._busy)
            except queue.Empty:
                return True
            if action is None:
                return False
            action()

    def _start(self, job: Job) -> None:
        first = 0
        for request in job.requests:
            ticket = self.decoders[job.model].submit(request, partial(self._listen, job, first))
            job.tickets.append(ticket)
            first += request.count
        self._busy.add(job.model)

    def _stop(self, job: Job) -> None:
        for ticket in job.tickets:
            self.decoders[job.model].cancel(ticket)
        self._busy.add(job.model)  # the next step tells that it has ended

    def _listen(self, job: Job, first: int, event: Event) -> None:
        self._outbox.append((job, first + event.index, event))

    def _publish(self) -> None:
        """One call of the event loop for all tokens of a step."""
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._loop.call_soon_threadsafe(self._deliver, outbox)
