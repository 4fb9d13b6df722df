"""What a person reads while a command runs: plain lines on stderr through one rich console."""

from functools import cache

from rich.console import Console
from rich.text import Text


@cache
def console() -> Console:
    """The one console. stderr, so that a command's result on stdout can be piped."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str, *, style: str | None = None) -> None:
    """One line, shown as it is: brackets are not markup."""
    console().print(Text(message, style=style or ""))


def warn(message: str) -> None:
    say(f"warning: {message}", style="yellow")


@cache
def warn_once(message: str) -> None:
    warn(message)
