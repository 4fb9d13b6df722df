"""Calls of strangers' functions: given up when they are late, and what is told of what they raise.

They run in a thread, in an event loop or in the main thread. Not here: what is called, and what with.
"""

import asyncio
import inspect
import signal
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from swift.plugins.turns import settle


class LateError(BaseException):
    """Time is up. No Exception, because what it interrupts may catch every Exception."""


def start_thread(call: Callable[[], Any]) -> Future[Any]:
    """Runs it in a thread of its own, which does not keep the process alive; it has the GPU of this one."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    future: Future[Any] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            if device is not None:
                torch.cuda.set_device(device)
            future.set_result(call())
        except BaseException as error:  # told to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def start_coroutine(make: Callable[[], Coroutine[Any, Any, Any]]) -> Future[Any]:
    """Runs it in the event loop of this process."""

    async def run() -> Any:
        return await make()

    return asyncio.run_coroutine_threadsafe(run(), _event_loop())


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def take_result(future: Future[Any], seconds: float) -> Any:
    """What it returned; what it raised is raised. Raises LateError."""
    if not wait([future], max(seconds, 0)).done:
        future.cancel()  # ends a coroutine; a thread goes on, and nobody listens
        raise LateError
    return future.result()


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Raises LateError in the main thread, out of whatever it does, waiting included. For that thread only.

    SIGALRM stays with whom it is for: libraries that the function uses.
    """

    def ring(*_: object) -> None:
        raise LateError

    previous = signal.signal(signal.SIGUSR2, ring)
    timer = threading.Timer(seconds, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # so that it cannot ring once nobody expects it
        signal.signal(signal.SIGUSR2, previous)


def run_here(call: Callable[[], Any], seconds: float) -> Any:
    """What it returns, called in this thread where that can be interrupted. Raises LateError."""
    if threading.current_thread() is not threading.main_thread():
        return take_result(start_thread(call), seconds)
    with interrupt_after(seconds):
        return call()


def call_all(calls: Sequence[Callable[[], Any]], seconds: float) -> list[Any]:
    """What each gives: called one after the other; those that are coroutines wait together."""
    values = run_here(lambda: [call() for call in calls], seconds)

    async def settle_all() -> list[Any]:
        return await asyncio.gather(*map(settle, values))

    if not any(map(inspect.isawaitable, values)):
        return values
    return take_result(start_coroutine(settle_all), seconds)


def tell_error(error: Exception, file: str) -> str:
    """Kind, first line and place of an error: the last line of `file` that was running, else of any."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename == file), frames[-1])
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {message} ({Path(frame.filename).name} line {frame.lineno})"
