"""Rows of trainings that do not learn one conversation by heart: pairs, liked or not, prompts.

Owns: the columns of such rows, in the spellings of earlier tools and of TRL. Not here: the conversation in
them (formats.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from swift.data.formats import SYSTEM, Columns, to_sample
from swift.data.messages import parse_json, parse_messages
from swift.data.types import Example, Row, RowError, Sample, parse_number
from swift.template.types import Message

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
_REPLACED = ("messages", "conversation", "conversations", "query", "response")  # beside chosen: copies of it


@dataclass(frozen=True, slots=True)
class PromptSample:
    """What is asked, and the row's own answer where it has one."""

    sample: Sample
    answer: Message | None

    @property
    def label(self) -> str | None:
        """The words of that answer."""
        return None if self.answer is None else self.answer["content"]


def to_preference(row: Row) -> Example:
    """Chosen and rejected, of which the chosen one keeps the row's other columns, and the margin or 0.

    From {messages, rejected_response | rejected_messages} or {[prompt], chosen, rejected}.
    """
    columns = _columns_of(row)
    given = columns.take(("margin",))
    margin = 0.0 if given in (None, "") else parse_number(given, "margin")
    rejected_tools = columns.take(("rejected_tools",))
    if columns.has("chosen") or columns.has("rejected"):
        chosen, rejected = _from_pair(columns, row)
    else:
        chosen, rejected = _from_answer(columns, row)
    if rejected_tools is not None:
        rejected = _conversation(row, columns, rejected.messages, {"tools": rejected_tools})
    for sample, name in ((chosen, "chosen"), (rejected, "rejected")):
        if sample.messages[-1]["role"] != "assistant":
            raise RowError(f"{name} does not end with an assistant message")
    if chosen.messages == rejected.messages:
        raise RowError("chosen and rejected are the same")
    return Example((chosen, rejected), (margin,))


def to_kto(row: Row) -> Example:
    """A conversation and its column `label`: 1 where its end is liked, else 0."""
    columns = _columns_of(row)
    label = columns.take(("label",))
    word = str(label).lower()
    if word not in (*_TRUE, *_FALSE):
        raise RowError("no label" if label is None else "a label that is not true or false")
    sample = to_sample(replace(row, columns=columns.rest()))
    if sample.messages[-1]["role"] != "assistant":
        raise RowError("no assistant message at the end")
    return Example((sample,), (float(word in _TRUE),))


def to_prompt(row: Row) -> PromptSample:
    """A conversation without a final assistant message, which is the row's own answer."""
    sample = to_sample(row)
    messages, answer = sample.messages, None
    if messages[-1]["role"] == "assistant":
        messages, answer = messages[:-1], messages[-1]
    if not any(message["role"] != "system" for message in messages):
        raise RowError("no question")
    return PromptSample(replace(sample, messages=messages), answer)


def _from_answer(columns: Columns, row: Row) -> tuple[Sample, Sample]:
    """messages, of which the last is chosen, and what would have been worse."""
    messages = columns.take(("rejected_messages",))
    response = columns.take(("rejected_response",))
    if messages is None and response in (None, "", []):
        raise RowError("no rejected answer")
    chosen = to_sample(replace(row, columns=columns.rest()))
    if messages is None:
        last = max((i for i, m in enumerate(chosen.messages) if m["role"] == "user"), default=-1)
        messages = [*chosen.messages[: last + 1], *_answer(response)]
        return chosen, replace(chosen, messages=tuple(parse_messages(messages)), extra={})
    return chosen, _conversation(row, columns, parse_messages(messages), {})


def _from_pair(columns: Columns, row: Row) -> tuple[Sample, Sample]:
    """chosen and rejected, each an answer or a whole conversation, after a prompt or without one."""
    answers = [columns.take((name,)) for name in ("chosen", "rejected")]
    if any(answer in (None, "", []) for answer in answers):
        raise RowError("chosen and rejected do not both have an answer")
    prompt = columns.take(("prompt", "query", "question"))
    for names in (*((name,) for name in _REPLACED), SYSTEM, ("tools",)):
        columns.take(names)
    asked = _question(prompt)
    chosen, rejected = (_conversation(row, columns, _join(asked, _answer(answer)), {}) for answer in answers)
    return replace(chosen, extra=columns.rest()), rejected


def _conversation(row: Row, columns: Columns, messages: Sequence[Message], other: dict[str, Any]) -> Sample:
    """One side of a pair, with the row's system prompt and tools."""
    shared = {name: columns.value(name) for name in (*SYSTEM, "tools") if columns.has(name)}
    sample = to_sample(replace(row, columns={**shared, "messages": list(messages), **other}))
    return replace(sample, extra={})


def _join(asked: list[Message], answer: list[Message]) -> list[Message]:
    """The whole conversation; `answer` may repeat what was asked, or hold it alone."""
    begins = [message for message in asked if message["role"] != "system"]
    spoken = [message for message in answer if message["role"] != "system"]
    if not asked and spoken[:1] and spoken[0]["role"] == "assistant":
        raise RowError("chosen and rejected without a prompt")
    if spoken[: len(begins)] == begins:
        system = asked[:1] if len(answer) == len(spoken) and len(begins) < len(asked) else []
        return [*system, *answer]
    if any(message["role"] == "user" for message in answer):
        raise RowError("chosen or rejected does not begin with the prompt")
    return [*asked, *answer]


def _question(prompt: Any) -> list[Message]:
    if prompt in (None, "", []):
        return []
    return _listed(prompt) or [{"role": "user", "content": str(prompt)}]


def _answer(value: Any) -> list[Message]:
    return _listed(value) or [{"role": "assistant", "content": value}]


def _listed(value: Any) -> list[Message]:
    """A list of messages or one message, also as JSON text; empty where it is something else."""
    if isinstance(value, str) and value.startswith(("[{", '{"role"')):
        try:
            value = parse_json(value, "messages")
        except RowError:
            return []
    if isinstance(value, dict):
        value = [value]
    return parse_messages(value) if isinstance(value, list) else []


def _columns_of(row: Row) -> Columns:
    if row.problem:
        raise RowError(row.problem)
    return Columns(row.columns)
