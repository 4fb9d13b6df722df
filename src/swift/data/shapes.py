"""Which conversations, and which numbers beside them, a row holds for each way of training.

Owns: the table of row shapes. Not here: the columns of each (formats.py, preference.py), tokens (encode.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from swift.data.formats import to_sample
from swift.data.messages import parse_messages
from swift.data.preference import to_kto, to_preference, to_prompt
from swift.data.types import Example, Row, RowError, Sample, parse_number
from swift.template.types import Message


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows are read. Raises RowError for a row that is not of this shape."""

    read: Callable[[Row], Example]
    values: tuple[str, ...] = ()  # names of an example's numbers
    # Name -> number of the first sequence, of the second, ...; the last one counts for all after it.
    by_place: tuple[tuple[str, tuple[float, ...]], ...] = ()
    waits: bool = False  # for an answer: nothing in it is trained


def _read_labelled(row: Row) -> Example:
    sample = to_sample(row)
    return Example((sample,), (parse_number(sample.extra.get("label"), "label"),))


def _read_alike(row: Row) -> Example:
    """Two texts and how alike they are: messages and positive_messages, or query and response."""
    anchor, others = _read_group(row)
    if len(others) != 1:
        raise RowError(f"{len(others)} texts to compare with, where there should be one")
    return Example((anchor, others[0]), (parse_number(anchor.extra.get("label"), "label"),))


def _read_anchors(row: Row) -> Example:
    anchor, others = _read_group(row)
    return Example((anchor, *others))


def _read_documents(row: Row) -> Example:
    """A query with each of its documents, the right one first."""
    query, documents = _read_group(row, "assistant")
    joined = (replace(query, messages=(*query.messages, *document.messages)) for document in documents)
    return Example(tuple(joined))


def _read_judged(row: Row) -> Example:
    """The same as questions to be answered by yes or no; a system message says what is asked for.

    In the words that Qwen3-Reranker was trained on, as its model card gives them.
    """
    query, documents = _read_group(row, "assistant")
    first, last = query.messages[0], query.messages[-1]
    wanted = first["content"] if first["role"] == "system" else INSTRUCTION
    system: Message = {"role": "system", "content": JUDGE}
    asked = (
        f"<Instruct>: {wanted}\n<Query>: {last['content']}\n<Document>: {document.messages[-1]['content']}"
        for document in documents
    )
    return Example(
        tuple(replace(query, messages=(system, {"role": "user", "content": text})) for text in asked)
    )


def _read_group(row: Row, role: str = "user") -> tuple[Sample, list[Sample]]:
    """What is asked, its right partner and any wrong ones. `role` says what is given as mere text."""
    columns = {name: value for name, value in row.columns.items() if name not in _PARTNERS}
    positive, negative = (row.columns.get(name) or [] for name in _PARTNERS)
    wrong = row.columns.get("rejected_response") or []
    anchor = to_sample(replace(row, columns={k: v for k, v in columns.items() if k != "rejected_response"}))
    if not positive and anchor.messages[-1]["role"] == "assistant":  # query and response
        positive = [anchor.messages[-1]["content"]]
        negative = [wrong] if isinstance(wrong, str) else list(wrong)
        anchor = replace(anchor, messages=anchor.messages[:-1])
    if not positive:
        raise RowError("no positive_messages")
    texts = [_as_messages(value, role) for value in (*positive, *negative)]
    return anchor, [replace(anchor, messages=tuple(messages), extra={}) for messages in texts]


def _as_messages(value: Any, role: str) -> list[Message]:
    """A text, which `role` says, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return parse_messages([value] if isinstance(value, dict) else value)


_PARTNERS = ("positive_messages", "negative_messages")
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
SHAPES: dict[str, Shape] = {
    "chat": Shape(lambda row: Example((to_sample(row),))),
    "pair": Shape(to_preference, ("margin",)),  # chosen, rejected
    "kto": Shape(to_kto, ("label",)),  # 1 = liked
    "prompt": Shape(lambda row: Example((to_prompt(row).sample,)), waits=True),
    "classes": Shape(lambda row: Example((to_sample(row),))),  # several at once, see columns.py
    "labelled": Shape(_read_labelled, ("label",)),  # a class or a number
    "alike": Shape(_read_alike, ("label",)),  # two texts
    "anchors": Shape(_read_anchors, by_place=(("role", (0, 1, 2)),)),  # anchor, positive, negatives
    "documents": Shape(_read_documents, by_place=(("label", (1, 0)),)),  # of one query
    "judged": Shape(_read_judged, by_place=(("label", (1, 0)),), waits=True),  # the same, as questions
}
