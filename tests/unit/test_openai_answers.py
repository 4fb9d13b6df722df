"""Thoughts, words and calls of tools in what a model writes, whatever pieces it comes in."""

import json

import pytest

from swift.infer.openai_answers import AnswerSplitter, Delta
from swift.template.agents import FORMATS

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"properties": {"a": {"type": "integer"}, "who": {"type": "string"}}},
        },
    }
]
CALLS = [("add", {"a": 5, "who": "5"}), ("add", {"a": -1, "who": "you\nand me"})]


def read(pieces: list[str], **options) -> Delta:
    splitter = AnswerSplitter(**options)
    whole = Delta()
    for piece in pieces:
        whole.add(splitter.push(piece))
    whole.add(splitter.push("", final=True))
    return whole


def read_all_ways(text: str, **options) -> Delta:
    """In one piece, in single characters, and cut in two everywhere: always the same."""
    whole = read([text], **options)
    cuts = [[text[:i], text[i:]] for i in range(1, len(text))]
    for pieces in (list(text), *cuts):
        other = read(pieces, **options)
        assert (other.reasoning, other.content) == (whole.reasoning, whole.content)
        assert [call["function"] for call in other.calls] == [call["function"] for call in whole.calls]
    return whole


@pytest.mark.parametrize(
    ("text", "thinks", "reasoning", "content"),
    [
        ("Hello.", False, "", "Hello."),
        ("  Hello. \n", False, "", "  Hello. \n"),
        ("<think>\nWhy?\n\nSo.\n</think>\n\nHello. ", False, "Why?\n\nSo.", "Hello. "),
        ("\n<think></think>Hello", False, "", "Hello"),
        ("<think>\nfor ever </thin", False, "for ever </thin", ""),
        ("Why?\n</think>\n\nHello.", True, "Why?", "Hello."),
        ("<thin", False, "", "<thin"),
        ("a <think>b</think> c", False, "", "a <think>b</think> c"),
        ("", False, "", ""),
    ],
)
def test_thoughts_come_first_and_lose_the_space_around_them(text, thinks, reasoning, content) -> None:
    found = read_all_ways(text, thinks=thinks)
    assert (found.reasoning, found.content, found.calls) == (reasoning, content, [])


def test_a_completion_is_words_alone() -> None:
    assert read_all_ways("<think>a</think> b", plain=True).content == "<think>a</think> b"


@pytest.mark.parametrize("name", FORMATS)
def test_calls_of_every_form_are_read_and_typed(name) -> None:
    form = FORMATS[name]
    text = f"<think>\nhm\n</think>\n\nLet me see.\n{form.calls(CALLS)}"
    found = read_all_ways(text, form=form, tools=TOOLS)
    assert (found.reasoning, found.content) == ("hm", "Let me see.")
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found.calls] == CALLS
    assert [call["index"] for call in found.calls] == [0, 1]
    assert len({call["id"] for call in found.calls}) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_call_stays_words(name) -> None:
    form = FORMATS[name]
    begun = form.calls(CALLS[:1])
    for text in (f"See:\n{begun[: len(begun) // 2]}", "5 < 6 { \n", "Actions: none, {} <tool"):
        found = read_all_ways(text, form=form, tools=TOOLS)
        assert (found.content, found.calls) == (text, [])
