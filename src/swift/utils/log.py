"""What a person reads while a command runs: plain lines on stderr through one rich console."""

from functools import cache

from rich.console import Console
from rich.text import Text

from swift.utils import env

LEVELS = {None: 0, "yellow": 1, "red": 2}  # how much a line matters, by its colour
SHOWN = {"trace": 0, "debug": 0, "info": 0, "warning": 1, "error": 2, "critical": 2}  # from which on, by name


@cache
def console() -> Console:
    """The one console. stderr, so that a command's result on stdout can be piped.

    Of several processes only the first one speaks.
    """
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=env.read("RANK", "0") != "0")


def result_console() -> Console:
    """Where the result of a command goes: stdout. Wide where it is no terminal, so that no path is broken."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=200)


def say(message: str, *, style: str | None = None) -> None:
    """One line, shown as it is: brackets are not markup. Not shown where SWIFT_LOG_LEVEL is above it."""
    if LEVELS.get(style, 0) >= SHOWN.get(env.read("SWIFT_LOG_LEVEL", "info") or "", 0):
        console().print(Text(message, style=style or ""))


def warn(message: str) -> None:
    say(f"warning: {message}", style="yellow")


@cache
def warn_once(message: str) -> None:
    warn(message)
