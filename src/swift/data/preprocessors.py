"""What users derive from to say what the rows of their data set mean.

Owns: the base classes, which give a row canonical names before `preprocess` sees it. Not here: which data set
has which (datasets.py), the names themselves (formats.py).
"""

from typing import Any

from swift.data.formats import MESSAGES, QUERY, RESPONSE, SYSTEM, Columns, to_sample
from swift.data.types import Row, RowError


class RowPreprocessor:
    """A row to a row, or to None where it is not wanted. `columns` renames {old: new} first."""

    groups: tuple[tuple[str, ...], ...] = ()  # names of one thing; the first one is what `preprocess` sees
    spoken: tuple[str, ...] = ()  # columns that become messages

    def __init__(self, *, columns: dict[str, str] | None = None) -> None:
        self.columns = columns or {}

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """As it is here: the columns `spoken` become messages."""
        if not self.spoken:
            raise NotImplementedError
        spoken = {name: row[name] for name in self.spoken if name in row}
        rest = {name: value for name, value in row.items() if name not in spoken}
        return {**rest, "messages": list(to_sample(Row(spoken, "", 0)).messages)}

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """A copy of the row with its columns renamed and in canonical names."""
        columns = Columns({self.columns.get(name, name): value for name, value in row.items()})
        found = {group[0]: columns.take(group) for group in self.groups}
        return {**columns.rest(), **{name: value for name, value in found.items() if value is not None}}

    def apply(self, row: Row) -> Row | None:
        """`preprocess` with a row's place kept; what it raises becomes the row's problem."""
        try:
            columns = self.preprocess(self.prepare(row.columns))
        except RowError as error:
            return Row(row.columns, row.file, row.line, str(error))
        except Exception as error:  # a plugin is a stranger's program
            problem = f"{type(self).__name__} fails: {type(error).__name__}: {error}"
            return Row(row.columns, row.file, row.line, problem)
        return None if columns is None else Row(columns, row.file, row.line)


class ResponsePreprocessor(RowPreprocessor):
    """Columns query and response, with history and system where there are any, become messages."""

    groups = (SYSTEM, QUERY, RESPONSE)
    spoken = ("system", "history", "query", "response")


class AlpacaPreprocessor(RowPreprocessor):
    """Columns instruction, input and output become messages."""

    groups = (SYSTEM,)
    spoken = ("system", "history", "instruction", "input", "output")


class MessagesPreprocessor(RowPreprocessor):
    """A column with a list of messages, in any spelling."""

    groups = (SYSTEM, MESSAGES)
    spoken = ("system", "messages")

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any] | None:
        if "messages" not in row:
            raise RowError("no column with a list of messages")
        return super().preprocess(row)


class AutoPreprocessor(RowPreprocessor):
    """Leaves the row as it is: what its columns mean is found out row by row anyway."""

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return row
