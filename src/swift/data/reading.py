"""Reads files of rows.

Owns: lines of JSON, JSON, CSV, text and folders of them, every row with its place in the file. There is no
schema: rows of one file may have any shapes. Not here: Parquet (parquet.py, needs pyarrow), which rows are
taken (sources.py), what they mean (formats.py).
"""

import csv
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError
from swift.data.types import Row, place
from swift.utils.log import say

_SPACE = re.compile(r"\s*")
_HELD_OUT = ("test", "val", "dev", "eval")


def import_extra(module: str, *, needs: tuple[str, ...], extra: str, purpose: str) -> Any:
    """A module of ours that stands on an optional package; ConfigError says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in needs:
            raise
        raise ConfigError(
            f"{purpose} needs the package {missing}", hint=f"pip install 'swiftune[{extra}]'"
        ) from error


def list_files(path: Path) -> list[Path]:
    """The files of a folder, or the one file. Raises ConfigError for kinds that cannot be read."""
    if not path.is_dir():
        if path.suffix.lower() not in _KINDS:
            kind = path.suffix or "a file without suffix"
            raise ConfigError(f"{path}: cannot read {kind}", hint=f"known: {', '.join(_KINDS)}")
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in _KINDS
        and file.suffix.lower() != ".txt"  # a README as a rule
        and not file.stem.startswith("dataset_info")
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ConfigError(f"{path}: no {', '.join(s for s in _KINDS if s != '.txt')} file in this folder")
    if any(file.stem.startswith("train") for file in files):
        # A copy of a hub's data set: its other splits are not for training.
        left_out = [file for file in files if file.stem.startswith(_HELD_OUT)]
        if left_out:
            say(f"{path}: left out {', '.join(file.name for file in left_out)}")
        files = [file for file in files if file not in left_out]
    return files


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file that is not JSON Lines, each with its place."""
    try:
        yield from _READERS[path.suffix.lower()](path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def read_line(line: bytes, file: str, number: int) -> Row:
    """A line of JSON Lines."""
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place(file, number)}: not UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise _broken_json(file, number, error) from error
    return _row(value, file, number)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or objects one after another; line = where an object begins."""
    file, text = str(path), _read_text(path)
    decoder = json.JSONDecoder()
    position, line = _skip(text, 0), 1
    is_list = text.startswith("[", position)
    position = _skip(text, position + 1) if is_list else position
    counted = 0
    closed = not is_list
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        if is_list and text[position] == "]":
            closed, position = True, _skip(text, position + 1)
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken_json(file, error.lineno, error) from error
        yield _row(value, file, line)
        position = _skip(text, position)
        if is_list and text.startswith(",", position):
            position = _skip(text, position + 1)
        elif is_list and not text.startswith("]", position):
            break
    if position < len(text) or not closed:
        problem = "text after the end" if closed else "the list is not closed, or a comma is missing"
        raise ConfigError(f"{place(file, text.count(chr(10), 0, position) + 1)}: not valid JSON ({problem})")


def _read_csv(path: Path) -> Iterator[Row]:
    # The module's limit of 128 KiB a field is there against broken quoting; long documents are normal here.
    csv.field_size_limit(sys.maxsize)
    file = str(path)
    with path.open(encoding="utf-8-sig", newline="") as handle:
        try:
            for number, columns in enumerate(csv.DictReader(handle), start=1):
                if None in columns:
                    raise ConfigError(f"{place(file, number)}: more fields than the header has")
                yield Row(columns, file, number)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8 ({error.reason})") from error
        except csv.Error as error:
            raise ConfigError(f"{file}: not valid CSV ({error})") from error


def _read_txt(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield Row({"text": line.rstrip("\r")}, str(path), number)


def _read_parquet(path: Path) -> Iterator[Row]:
    module = import_extra(
        "swift.data.parquet", needs=("pyarrow",), extra="parquet", purpose=f"{path}: reading Parquet"
    )
    yield from module.read_parquet(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason})") from error


def _skip(text: str, position: int) -> int:
    """The next character that is no white space."""
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _row(value: Any, file: str, line: int) -> Row:
    if not isinstance(value, dict):
        kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
        raise ConfigError(
            f"{place(file, line)}: not a JSON object but {kinds.get(type(value), 'a number')}",
            hint="a row is {...}; a file that is one list of rows should end in .json",
        )
    return Row(value, file, line)


def _broken_json(file: str, line: int, error: ValueError) -> ConfigError:
    reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return ConfigError(f"{place(file, line)}: not valid JSON ({reason})")


JSON_LINES = ".jsonl"
_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
_KINDS = (JSON_LINES, *_READERS)
