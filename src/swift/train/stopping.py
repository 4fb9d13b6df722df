"""How a run is told to stop before its end: signals, on one process or on any of several.

A signal raises a flag that travels with the next exchange between processes, so that all stop after one step.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from swift.engines.ranks import Ranks

FAILED, TERMINATE, INTERRUPT = 1, 2, 4  # flags of Ranks: a checkpoint could not be written; SIGTERM; Ctrl-C
ECHO_SECONDS = 1.0  # a terminal sends Ctrl-C to every process, and then torchrun passes it on once more


class Terminated(Exception):
    """SIGTERM was heeded: the step is finished and saved."""


@contextmanager
def heed_signals(ranks: Ranks) -> Iterator[None]:
    """SIGTERM, and Ctrl-C on several processes, become flags. Alone, Ctrl-C raises; the second one quits."""
    pressed: list[float] = []

    def terminate(*_: object) -> None:
        ranks.flag(TERMINATE)

    def interrupt(*_: object) -> None:
        now = time.monotonic()
        if not pressed:
            pressed.append(now)
            if ranks.world == 1:
                raise KeyboardInterrupt
            ranks.flag(INTERRUPT)
        elif ranks.world == 1 or now - pressed[0] > ECHO_SECONDS:
            os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals: whoever trains in another one handles them
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
