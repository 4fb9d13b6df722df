"""Accidents between the page that a command was copied from and the shell: repaired if safe, else explained.

Works on argv, so it sees what the shell made of the text, not the text.
"""

import re
import unicodedata
from collections.abc import Sequence

from swift.config.option import ConfigError

FLAG = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)
DASHES = "‐‑‒–—―−﹘﹣－"
DASHED_FLAG = re.compile(rf"-?[{DASHES}]+-?([A-Za-z][\w-]*(?:=.*)?)", re.DOTALL)
QUOTES = "“”„‟‘’‚‛"
BLANK_ARGUMENT = (
    "a backslash followed by blanks passes a blank argument; ignored "
    "(if a # comment stands there, the shell ends the command at it and runs the next lines as another one)"
)


def is_flag(word: str) -> bool:
    return FLAG.fullmatch(word) is not None


def repair_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without blank ones, and warnings; ConfigError where only the user can know."""
    words: list[str] = []
    warnings: list[str] = []
    for word in argv:
        stripped = word.lstrip()
        if word and not stripped and "\n" not in word:
            warnings.append(BLANK_ARGUMENT)
        elif stripped != word and is_flag(stripped):
            warnings.append(BLANK_ARGUMENT)
            words.append(stripped)
        else:
            words.append(word)
    for word in words:
        _check_word(word)
    _check_quotes(words)
    return words, list(dict.fromkeys(warnings))


def _check_word(word: str) -> None:
    dashed = DASHED_FLAG.fullmatch(word)
    if dashed:
        character = next(c for c in word if c in DASHES)
        name = f"{unicodedata.name(character).lower()}, U+{ord(character):04X}"
        raise ConfigError(
            f"{word!r} does not begin with two hyphens but with another dash ({name})",
            hint=f"type --{dashed[1]}",
        )
    if word.endswith("\r"):
        raise ConfigError(
            f"{word!r} ends with a carriage return: the script has Windows line ends",
            hint="convert it, for example with dos2unix or sed -i 's/\\r$//'",
        )


def _check_quotes(words: list[str]) -> None:
    """Typographic quotes do not quote: the shell hands them over, and cuts the text at its blanks."""
    for start, word in enumerate(words):
        if len(word) < 2 or word[0] not in QUOTES:
            continue
        for end in range(start, len(words)):
            if is_flag(words[end]):
                break
            if words[end] and words[end][-1] in QUOTES:
                text = " ".join(words[start : end + 1])
                raise ConfigError(
                    f"{text!r} is in typographic quotes, which the shell does not understand",
                    hint=f"type plain quotes: '{text[1:-1]}' (if these belong to the text, use a .yaml file)",
                )
