"""Rows and samples, with the place in a file that they come from."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from swift.template.types import Message

_COUNTED_IN_ROWS = (".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read, in any shape."""

    columns: dict[str, Any]
    file: str
    line: int  # from 1; in CSV and Parquet the number of the row
    problem: str | None = None  # why its preprocessor could not read it


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `extra` keeps every column that is not part of it."""

    messages: tuple[Message, ...]
    tools: list[Any] | None
    extra: dict[str, Any]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Example:
    """A row as it is trained on: conversations that stay together, and numbers that go with them."""

    samples: tuple[Sample, ...]
    values: tuple[float, ...] = ()


class RowError(ValueError):
    """A row that cannot be understood; the message is a short reason, the same for the same fault."""


def parse_number(value: Any, name: str) -> float:
    """The column `name`, which has to be a number. Raises RowError."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RowError(f"no {name}" if value is None else f"a {name} that is not a number") from error


def place(file: str, line: int) -> str:
    """How messages name a row: "data.jsonl line 3", "data.csv row 3"."""
    unit = "row" if PurePath(file).suffix.lower() in _COUNTED_IN_ROWS else "line"
    return f"{file} {unit} {line}"
