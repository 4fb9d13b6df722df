"""Rows that are read when they are asked for, and not kept.

Owns: places of the lines of JSON Lines files, other sources' rows, taking and joining by row number, the
digest of content and choice. Not here: the syntax of --dataset (sources.py), files of each kind (reading.py).
"""

import difflib
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from swift.config.option import ConfigError
from swift.data.reading import JSON_LINES, list_files, read_file, read_line
from swift.data.types import Row, place
from swift.utils.files import file_sha256

_BLOCK = 1 << 20  # bytes of each end of a file


@dataclass(frozen=True, slots=True)
class Line:
    """A row that has not been parsed: cheap to send to another process."""

    text: bytes
    file: str
    line: int


class JsonLines:
    """A file of JSON Lines; only the places of its lines are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _scan(self) -> tuple[np.ndarray, np.ndarray, str]:
        """[R, 2] bytes (start, end) of every line with a row, [R] its number, the file's sha256."""
        digest, places, numbers, start = hashlib.sha256(), array("q"), array("q"), 0
        with _opened(self.path) as handle:
            for number, line in enumerate(handle, start=1):
                digest.update(line)
                end = start + len(line)
                if line.strip(b"\xef\xbb\xbf \t\r\n\x0b\x0c"):
                    places.append(start)
                    places.append(end)
                    numbers.append(number)
                start = end
        self._stamp = _stamp(self.path)
        return np.array(places).reshape(-1, 2), np.array(numbers), digest.hexdigest()

    @cached_property
    def _handle(self) -> Any:
        return _opened(self.path)

    @property
    def digest(self) -> str:
        return self._scan[2]

    def __len__(self) -> int:
        return len(self._scan[1])

    def __getitem__(self, index: int) -> Line:
        (start, end), number = self._scan[0][index], int(self._scan[1][index])
        text = os.pread(self._handle.fileno(), int(end - start), int(start))
        return Line(text.removeprefix(b"\xef\xbb\xbf") if start == 0 else text, str(self.path), number)

    def stream(self) -> Iterator[Line]:
        """Every row, read anew and not kept."""
        file = str(self.path)
        with _opened(self.path) as handle:
            for number, text in enumerate(handle, start=1):
                text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
                if text.strip():
                    yield Line(text, file, number)

    def check_unchanged(self) -> None:
        if _stamp(self.path) != self._stamp:
            raise ConfigError(f"{self.path} changed while it was read", hint="start again")


class OtherFile:
    """A file of another kind, read whole when its first row is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _rows(self) -> list[Row]:
        return list(read_file(self.path))

    @cached_property
    def digest(self) -> str:
        return file_sha256(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def stream(self) -> Iterator[Row]:
        return read_file(self.path)


class InMemory(list[Row]):
    """Rows that came from elsewhere than a file."""

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for row in self:
            known = [row.columns, row.file, row.line, row.problem]
            digest.update(json.dumps(known, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def stream(self) -> Iterator[Row]:
        return iter(self)


Part = JsonLines | OtherFile | InMemory  # rows of one origin


@dataclass(frozen=True, eq=False, repr=False)
class Rows(Sequence[Row]):
    """Rows of some parts, in an order. `recipe` says how they were chosen: with the content, the digest."""

    parts: Sequence[Part]
    choose: Callable[[], np.ndarray] | None = None
    recipe: Any = "all"
    columns: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _starts(self) -> np.ndarray:
        """[parts + 1] the number of each part's first row."""
        return np.cumsum([0, *map(len, self.parts)])

    @cached_property
    def numbers(self) -> np.ndarray:
        """[R] which rows of all the parts', counted through."""
        return np.arange(self._starts[-1]) if self.choose is None else self.choose()

    @property
    def digest(self) -> str:
        known = [[part.digest for part in self.parts], self.recipe, self.columns]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [parse_row(item, self.columns) for item in self.unparsed(index)]
        return parse_row(self._item(int(self.numbers[index])), self.columns)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def unparsed(self, which: slice) -> list[Row | Line]:
        """Rows for `parse_row`, which may run in another process."""
        return [self._item(number) for number in self.numbers[which].tolist()]

    def _item(self, number: int) -> Row | Line:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1 if len(self.parts) > 1 else 0
        return self.parts[part][number - int(self._starts[part])]

    def take(self, choose: Callable[["Rows"], Any], recipe: Any) -> "Rows":
        """The rows with the numbers that `choose` returns, once they are asked for."""
        return replace(
            self,
            choose=lambda: self.numbers[np.asarray(choose(self), dtype=np.int64)],
            recipe=[self.recipe, recipe],
        )

    def rename(self, columns: dict[str, Any]) -> "Rows":
        """Renames columns, once it is seen that some row has each of them."""

        def choose() -> np.ndarray:
            _check_columns(self, columns)
            return self.numbers

        return replace(self, choose=choose, columns=columns)

    def check_unchanged(self) -> None:
        """Raises ConfigError where a file is no longer the one that the digest is of."""
        for part in self.parts:
            if isinstance(part, JsonLines):
                part.check_unchanged()


def mark_ends(part: Part) -> str:
    """What a part is known by again without reading all of it: its size and both ends, if it is a file."""
    if not isinstance(part, JsonLines | OtherFile):
        return part.digest
    with _opened(part.path) as handle:
        size = handle.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for start in (0, max(0, size - _BLOCK)):
            handle.seek(start)
            digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def open_path(path: Path) -> Rows:
    """The rows of a file or folder. Raises ConfigError where it is missing or of a kind that is not known."""
    files = list_files(path)
    parts = [JsonLines(f) if f.suffix.lower() == JSON_LINES else OtherFile(f) for f in files]
    for file in files:
        _opened(file).close()

    def choose() -> np.ndarray:
        count = sum(map(len, parts))
        if not count:
            raise ConfigError(f"{path}: no rows in it")
        return np.arange(count)

    return Rows(parts, choose=choose)


def read_path(path: Path, *, keep_broken: bool) -> list[Row]:
    """All rows of a file or folder, at once.

    With `keep_broken` a line of JSON Lines that is no row becomes one without columns and with a problem.
    """
    rows: list[Row] = []
    for item in chain.from_iterable(part.stream() for part in open_path(path).parts):
        try:
            rows.append(parse_row(item, {}))
        except ConfigError as error:
            if not keep_broken:
                raise
            reason = error.message.removeprefix(f"{place(item.file, item.line)}: ")
            rows.append(Row({}, item.file, item.line, problem=reason.partition(" (")[0]))
    if not rows:
        raise ConfigError(f"{path}: no rows in it")
    return rows


def join_rows(
    several: Sequence[Rows], *, mix: Callable[[list[int]], np.ndarray] | None = None, recipe: Any = "joined"
) -> Rows:
    """All rows, one table after another, or in the order that `mix` makes of the tables' lengths."""
    if len(several) == 1:
        return several[0]

    def choose() -> np.ndarray:
        starts = np.cumsum([0, *(sum(map(len, rows.parts)) for rows in several)])
        order = np.concatenate([rows.numbers + start for rows, start in zip(several, starts, strict=False)])
        return order if mix is None else order[mix([len(rows) for rows in several])]

    parts = [part for rows in several for part in rows.parts]
    recipes = [[rows.recipe, len(rows.parts)] for rows in several]
    return Rows(parts, choose=choose, recipe=[recipe, recipes])


def parse_row(item: Row | Line, columns: dict[str, Any]) -> Row:
    """The row itself, its columns renamed. Raises ConfigError where a line is not valid JSON."""
    row = read_line(item.text.strip(), item.file, item.line) if isinstance(item, Line) else item
    if not columns:
        return row
    # A renamed column wins over one that already has the new name.
    kept = {name: value for name, value in row.columns.items() if name not in columns}
    moved = {columns[name]: value for name, value in row.columns.items() if name in columns}
    return Row({**kept, **moved}, row.file, row.line, row.problem)


def _check_columns(rows: Rows, columns: dict[str, Any]) -> None:
    known: set[str] = set()
    for row in rows:
        known.update(row.columns)
        # Evaluation rows may have the new name already.
        if all(old in known or new in known for old, new in columns.items()):
            return
    old = next(old for old, new in columns.items() if old not in known and new not in known)
    near = difflib.get_close_matches(old, known, 1)
    raise ConfigError(
        f"--columns renames {old}, which no row has",
        hint=f"did you mean {near[0]}?" if near else f"columns are {', '.join(sorted(known))}",
    )


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
