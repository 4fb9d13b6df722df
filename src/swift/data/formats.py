"""What a row means: its columns to one conversation.

Owns: the families of columns (messages, alpaca, query and response) and their many names, decided row by row.
Not here: the forms of a message (messages.py); rows of other trainings (preference.py), which are refused by
name.
"""

from typing import Any

from swift.data.messages import add_message, check_tools, parse_json, parse_messages, parse_text
from swift.data.types import Row, RowError, Sample
from swift.template.types import Message

# Names in order of precedence, compared without case. The first one is the canonical name.
MESSAGES = ("messages", "conversation", "conversations")
SYSTEM = ("system", "system_prompt")
QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers"),
    *("solution", "text", "completion", "content"),
)
_PREFERENCE = ("rejected", "rejected_response", "rejected_messages")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")

PREFERENCE_DATA = "preference data, which is for swift rlhf --rlhf_type dpo"


def to_sample(row: Row) -> Sample:
    """The conversation in a row. Raises RowError."""
    if row.problem:
        raise RowError(row.problem)
    columns = Columns(row.columns)
    for name in _PREFERENCE:
        if columns.has(name):
            raise RowError(f"{PREFERENCE_DATA} (column {name})")
    for name in _MEDIA:
        if columns.has(name) and columns.value(name) not in ("", [], "[]"):
            raise RowError(f"images, video or sound: only text is supported (column {name})")
    system = columns.take(SYSTEM)
    tools = check_tools(columns.take(("tools",)))
    messages = _find_messages(columns)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": parse_text(system, "system")})
    return Sample(tuple(messages), tools, columns.rest(), row.file, row.line)


class Columns:
    """A row's columns by lower-case name, and which of them have been used. Null counts as absent."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._columns = columns
        self._names = {name.lower(): name for name in columns if columns[name] is not None}
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._names

    def value(self, name: str) -> Any:
        return self._columns[self._names[name]]

    def take(self, group: tuple[str, ...]) -> Any:
        """The first column of the group that the row has; None without one."""
        for name in group:
            if name in self._names:
                # The reward for accuracy reads "solution", so it stays a column of its own as well.
                if name != "solution":
                    self._used.add(self._names[name])
                return self.value(name)
        return None

    def rest(self) -> dict[str, Any]:
        """The columns that have not been taken, under their own names."""
        return {name: value for name, value in self._columns.items() if name not in self._used}

    def __str__(self) -> str:
        names = sorted(self._columns)
        return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _find_messages(columns: Columns) -> list[Message]:
    given = columns.take(MESSAGES)
    if given is not None:
        return parse_messages(given)
    messages = _parse_history(columns.take(("history",)))
    if columns.has("instruction") and columns.has("input"):
        parts = [parse_text(columns.take((name,)), "user") for name in ("instruction", "input")]
        query: Any = "\n".join(part for part in parts if part)
    else:
        query = columns.take(QUERY)
    response = columns.take(RESPONSE)
    _add(messages, "user", query)
    _add(messages, "assistant", response)
    if not messages:
        raise RowError(f"no column with a conversation (columns: {columns})")
    return messages


def _add(messages: list[Message], role: str, value: Any) -> None:
    """One side's words, or a list of messages in their place; nothing where it is empty."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        messages += parse_messages(value)
    elif value is not None and value != "":
        add_message(messages, role, value)


def _parse_history(value: Any) -> list[Message]:
    """[[question, answer], ...] or a list of messages."""
    value = parse_json(value, "history") if value else None
    if not value:
        return []
    if not isinstance(value, list):
        raise RowError("a history that is not a list")
    if all(isinstance(item, dict) for item in value):
        return parse_messages(value)
    messages: list[Message] = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("a history that is not a list of questions and answers")
        for role, words in zip(("user", "assistant"), pair, strict=True):
            _add(messages, role, words)
    return messages
