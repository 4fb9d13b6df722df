"""What becomes of every flag name that users may type and that no config field has (fates.tsv).

Columns of the table, separated by tabs:
  flag     the name, or NAME=VALUE for one value of a flag
  scope    where the row holds, see `Command.scopes`; several separated by commas
  fate     alias, later, unneeded or refused
  type     kind of value, see values.py; an alias has none, it takes the kind of its target
  default  value that counts as not given, beside none and false
  note     alias: the target, then OLD=NEW for values that are spelled differently; else the reason
A field of a command's config is supported there, whatever the table says. Rows for megatron alone overrule
that: its configs are those of swift with a few groups more, and its engine cannot do all that they offer.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from swift.cli.commands import Command
from swift.cli.values import parse_value

COLUMNS = ("flag", "scope", "fate", "type", "default", "note")


@dataclass(frozen=True, slots=True)
class Fate:
    """One row of the table."""

    flag: str
    scope: frozenset[str]
    fate: str
    kind: str
    default: str
    note: str

    @property
    def overrules(self) -> bool:
        """Whether it counts although the command's config has such a field."""
        return all(token.partition(":")[0] == "megatron" for token in self.scope)

    @property
    def target(self) -> str:
        """The flag that an alias stands for."""
        return self.note.split()[0]

    @property
    def default_value(self) -> Any:
        """What counts as not given."""
        words = self.default.split() if self.kind.startswith("list") else [self.default]
        return parse_value(self.flag, self.kind, tuple(words))

    @property
    def respelled(self) -> dict[str, str]:
        """Values of an alias that are spelled differently at the target."""
        return dict(pair.split("=", 1) for pair in self.note.split()[1:])


@cache
def load_fates() -> tuple[Fate, ...]:
    lines = Path(__file__).with_name("fates.tsv").read_text(encoding="utf-8").splitlines()
    assert tuple(lines[0].split("\t")) == COLUMNS, lines[0]
    rows = (line.split("\t") for line in lines[1:])
    return tuple(
        Fate(flag, frozenset(scope.split(",")), fate, kind, default, note)
        for flag, scope, fate, kind, default, note in rows
    )


@cache
def fates_of(command: Command) -> dict[str, Fate]:
    """The rows that hold for one command, by flag."""
    scopes = command.scopes
    return {row.flag: row for row in load_fates() if row.scope & scopes}
