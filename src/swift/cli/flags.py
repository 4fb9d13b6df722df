"""Flags: what each name means to a command, and how arguments become values.

Owns: the grammar of argv, unknown flags, aliases, and the fates of names and values. Flags are declared in
swift/config (supported) and in fates.tsv (everything else). Not here: the syntax of values (values.py).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from swift.cli.commands import COMMANDS, Command, closest, load
from swift.cli.fates import Fate, fates_of
from swift.cli.shell import is_flag
from swift.cli.values import kind_of, parse_value, to_word
from swift.config.option import ConfigError, Knob, check_value, iterate_knobs


@dataclass(frozen=True, slots=True)
class Given:
    """A flag as it was written: its name in snake_case, the words after it, and the file that it stood in."""

    typed: str
    name: str
    words: tuple[str, ...]
    file: str | None = None

    @property
    def where(self) -> str:
        return f"{self.typed} in {self.file}" if self.file else self.typed


@dataclass
class Resolved:
    """Values of one command line. `later` holds what was given for features that are not there yet."""

    command: Command
    values: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@cache
def knobs_of(command: Command) -> dict[str, Knob]:
    """The supported flags; a name that two groups share is one flag."""
    fates = fates_of(command)
    knobs: dict[str, Knob] = {}
    for knob in iterate_knobs(load(command.config)):
        if knob.name not in fates or not fates[knob.name].overrules:
            knobs.setdefault(knob.name, knob)
    return knobs


def split_arguments(argv: Sequence[str]) -> list[Given]:
    """Every `--flag` with the words up to the next one."""
    given: list[Given] = []
    for word in argv:
        if is_flag(word):
            typed, equals, value = word.partition("=")
            given.append(Given(typed, typed[2:].replace("-", "_"), (value,) if equals else ()))
        elif word.startswith("-") and word.lstrip("-").replace("-", "_").isidentifier():
            raise ConfigError(
                f"{word!r} is not a flag", hint=f"flags begin with two hyphens: --{word.lstrip('-')}"
            )
        elif not given:
            raise ConfigError(
                f"unexpected argument {word!r}",
                hint="only a .yaml, .yml or .json file may come first; flags begin with --",
            )
        else:
            given[-1] = dataclasses.replace(given[-1], words=(*given[-1].words, word))
    return given


def resolve(command: Command, given: Iterable[Given]) -> Resolved:
    """Names, then values; ConfigError with a line for each mistake. Checks no file, nothing across flags."""
    knobs, fates = knobs_of(command), fates_of(command)
    given = list(given)
    _raise_all(
        _complain(command, item, knobs, fates)
        for item in given
        if not (item.name in knobs or item.name in fates)
    )
    resolved = Resolved(command)
    renamed = [_follow_alias(item, knobs, fates, resolved) for item in given]
    kept = _last_of_each([item for item in renamed if item], resolved)
    _raise_all(_take(item, knobs, fates, resolved) for item in kept)
    return resolved


def _raise_all(messages: Iterable[str | None]) -> None:
    found = [message for message in messages if message]
    if found:
        raise ConfigError("\n".join(found))


def _complain(command: Command, item: Given, knobs: dict[str, Knob], fates: dict[str, Fate]) -> str:
    """One line for a flag that `command` does not know."""
    owners = owners_of(item.name)
    if owners:
        first = [owner for owner in owners if owner.program == command.program] or owners
        titles = [owner.title for owner in first]
        more = f" (and {len(titles) - 3} more)" if len(titles) > 3 else ""
        return f"{item.where} belongs to {', '.join(titles[:3])}{more}"
    usable = [
        *knobs,
        *(name for name, row in fates.items() if row.fate in ("alias", "later") and "=" not in name),
    ]
    longer = [name for name in usable if name.startswith(item.name)]
    near = longer[0] if len(longer) == 1 else closest(item.name, usable)
    if near is None:
        return f"unknown flag {item.where}; see {command.title} --help"
    is_alias = near not in knobs and fates[near].fate == "alias"
    return f"unknown flag {item.where}; did you mean --{fates[near].target if is_alias else near}?"


def owners_of(name: str) -> list[Command]:
    """Commands that know the flag: those that support it, else those that have another fate for it."""
    commands = [command for command in COMMANDS if command.name != "merge-lora"]
    supported = [command for command in commands if name in knobs_of(command)]
    usable = [c for c in commands if name in fates_of(c) and fates_of(c)[name].fate != "refused"]
    return supported or usable


def _follow_alias(
    item: Given, knobs: dict[str, Knob], fates: dict[str, Fate], resolved: Resolved
) -> Given | None:
    """The same under our name; None when the value asks for nothing, such as --use_cpu false."""
    row = fates.get(item.name)
    if item.name in knobs or row is None or row.fate != "alias":
        return item
    if resolved.command.program == "swift":  # Megatron has two names for most things, both of them right
        _note(resolved, f"{item.where} is --{row.target} here")
    words, respelled = item.words, row.respelled
    if "true" in respelled:
        words = (to_word(parse_value(item.where, "bool", words)),)
    words = tuple(respelled.get(word.lower(), word) for word in words)
    if respelled and words == ("",):
        return None
    return dataclasses.replace(item, name=row.target, words=words)


def _last_of_each(given: list[Given], resolved: Resolved) -> list[Given]:
    """One entry for each flag: the last one written. What a file says may be overridden silently."""
    last: dict[str, Given] = {}
    repeated: dict[str, int] = {}
    for item in given:
        if item.name in last and last[item.name].file == item.file:
            repeated[item.name] = repeated.get(item.name, 1) + 1
        last[item.name] = item
    for name, count in repeated.items():
        _note(resolved, f"warning: {last[name].where} is given {count} times; the last one counts")
    return list(last.values())


def _take(item: Given, knobs: dict[str, Knob], fates: dict[str, Fate], resolved: Resolved) -> str | None:
    """Puts one flag where it belongs; the message when that cannot be done."""
    try:
        if item.name in knobs:
            _take_supported(item, knobs[item.name], fates, resolved)
        else:
            _take_other(item, fates[item.name], resolved)
    except ConfigError as error:
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return None


def _take_supported(item: Given, knob: Knob, fates: dict[str, Fate], resolved: Resolved) -> None:
    words = item.words
    if item.file and words == ("null",) and not knob.optional:
        return  # null in a file leaves the default
    if knob.choices and "no" in knob.choices and words == ("false",):
        words = ("no",)  # YAML reads a bare no as false
    value = parse_value(item.where, kind_of(knob), words, optional=knob.optional)
    parts, stops = [], []
    for part in value if isinstance(value, tuple) else (value,):
        row = fates.get(f"{item.name}={part}")
        parts.append(row.target if row and row.fate == "alias" else part)
        if row and row.fate == "refused":
            raise ConfigError(f"{item.where} {part} is not supported: {row.note}")
        if row and row.fate == "later":
            stops.append(f"--{item.name} {part}")
    value = tuple(parts) if isinstance(value, tuple) else parts[0]
    if not stops:
        check_value(next(f for f in dataclasses.fields(knob.owner) if f.name == knob.name), value)
    resolved.values[item.name] = value
    resolved.stops += stops


def _take_other(item: Given, row: Fate, resolved: Resolved) -> None:
    if row.fate == "unneeded":
        _note(resolved, f"{item.where} has no effect: {row.note}")
        return
    value = parse_value(item.where, row.kind, item.words)
    off = value in (None, row.default_value) or (not row.default_value and not value)
    if row.fate == "later":
        resolved.later[item.name] = value
        if not off:
            resolved.stops.append(f"--{item.name}")
    elif not off:
        raise ConfigError(f"{item.where} is not supported: {row.note}")


def _note(resolved: Resolved, line: str) -> None:
    if line not in resolved.notes:
        resolved.notes.append(line)
