"""Columns to conversations: the families, their many names, and rows that are refused by reason."""

from typing import Any

import pytest

from swift.data.formats import to_sample
from swift.data.types import Row, RowError, Sample

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"


def sample(**columns: Any) -> Sample:
    return to_sample(Row(columns, "f.jsonl", 7))


def spoken(**columns: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in sample(**columns).messages]


QA = [(USER, "q"), (ASSISTANT, "a")]
USER_MESSAGE = {"role": "user", "content": "q"}
TEXT_PART = {"type": "text", "text": "p"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {
                "system": "s",
                "conversation": [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2"}],
            },
            [(SYSTEM, "s"), (USER, "q1"), (ASSISTANT, "a1"), (USER, "q2"), (ASSISTANT, "a2")],
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        (
            {"instruction": "i", "input": "x", "output": "o", "system": "s"},
            [(SYSTEM, "s"), (USER, "i\nx"), (ASSISTANT, "o")],
        ),
        ({"instruction": "i", "input": "", "output": "o"}, [(USER, "i"), (ASSISTANT, "o")]),
        ({"instruction": "i", "output": "o"}, [(USER, "i"), (ASSISTANT, "o")]),
        (
            {"query": "q", "response": "a", "history": [["h1", "r1"]], "system": "s"},
            [(SYSTEM, "s"), (USER, "h1"), (ASSISTANT, "r1"), *QA],
        ),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"question": "q", "answer": "a"}, QA),
        ({"problem": "q", "solution": "a"}, QA),
        ({"text": "raw"}, [(ASSISTANT, "raw")]),
        ({"query": "q", "prompt": "p", "response": "a"}, QA),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, QA),
        ({"Messages": [{"role": "User", "content": "q"}, {"role": "BOT", "content": "a"}]}, QA),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, QA),
        ({"prompt": [USER_MESSAGE], "completion": [{"role": "assistant", "content": "a"}]}, QA),
        ({"query": "q", "response": "a", "system": "", "history": None, "tools": None, "images": []}, QA),
        ({"query": 7, "response": 8.5}, [(USER, "7"), (ASSISTANT, "8.5")]),
        ({"query": "q", "response": None}, [(USER, "q")]),
        ({"query": "q", "response": ""}, [(USER, "q")]),
        (
            {"messages": [{"role": "user", "content": [TEXT_PART, TEXT_PART]}]},
            [(USER, "pp")],
        ),
    ],
)
def test_golden_table(columns: dict, expected: list) -> None:
    assert spoken(**columns) == expected


def test_other_columns_are_kept() -> None:
    found = sample(query="q", prompt="p", response="a", solution="42", label=None, nested={"x": [1]})
    assert found.extra == {"prompt": "p", "solution": "42", "label": None, "nested": {"x": [1]}}
    assert (found.file, found.line) == ("f.jsonl", 7)
    assert sample(problem="q", solution="a").extra == {"solution": "a"}


def test_system_message_wins_over_the_column() -> None:
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    assert spoken(system="column", messages=messages) == [(SYSTEM, "own"), (USER, "q")]


def test_same_speaker_twice_is_one_message() -> None:
    turns = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert spoken(messages=messages) == [(USER, "a\nb"), (ASSISTANT, "c\nd")]
    messages[2]["loss"] = False
    assert spoken(messages=messages) == [(USER, "a\nb"), (ASSISTANT, "c"), (ASSISTANT, "d")]


def test_weights_and_reasoning_stay_on_their_message() -> None:
    item = {
        "role": "assistant",
        "content": "a",
        "loss": False,
        "loss_scale": 0.5,
        "reasoning_content": "r",
        "x": 1,
    }
    found = sample(messages=[{"role": "user", "content": "q", "loss": None}, item])
    assert found.messages[0] == {"role": "user", "content": "q"}
    assert found.messages[1] == {key: value for key, value in item.items() if key != "x"}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "calling",
    [
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}],
        [{"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}],
        [{"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'}],
    ],
)
def test_tool_calls_in_every_spelling(calling: list[dict]) -> None:
    result = {"role": "tool_response", "content": {"t": "早"}}
    found = sample(messages=[{"role": "user", "content": "q"}, *calling, result])
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.messages[2] == {"role": "tool", "content": '{"t": "早"}'}


def test_calls_in_a_row_are_parallel_and_join_the_words_before() -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
    found = sample(
        messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "so"}, call, call]
    )
    assert found.messages[1] == {"role": "assistant", "content": "so", "tool_calls": [CALL, CALL]}


@pytest.mark.parametrize(
    "tools", ['[{"name": "f"}]', [{"name": "f"}], [{"type": "function", "function": {"name": "f"}}]]
)
def test_tools_column(tools: Any) -> None:
    assert sample(query="q", response="a", tools=tools).tools == [
        {"type": "function", "function": {"name": "f"}}
    ]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "swift rlhf --rlhf_type dpo (column rejected)"),
        ({"query": "q", "rejected_response": "b"}, "--rlhf_type dpo (column rejected_response)"),
        ({"foo": 1}, "no column with a conversation (columns: foo)"),
        ({"messages": []}, "no messages"),
        ({"messages": {"role": "user"}}, "messages that are not a list"),
        ({"messages": "not json"}, "messages that are not JSON"),
        ({"messages": ["q"]}, "a message that is not an object"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"messages": [{"content": "x"}]}, "a message without role"),
        ({"messages": [{"role": "user"}]}, "a user message without content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "an assistant message without content"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "an assistant message without content"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "a user message whose content is not text"),
        ({"messages": [{**USER_MESSAGE, "loss": "no"}]}, 'a "loss" that is not a number'),
        ({"messages": [{"role": "tool_call", "content": "f(x)"}]}, "a tool call that is not JSON"),
        ({"messages": [{"role": "tool_call", "content": "{}"}]}, "a tool call without name"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "images, video or sound"),
        ({"query": "q", "response": "a", "images": ["x.png"]}, "only text is supported (column images)"),
        ({"query": "q", "response": "a", "tools": "no"}, "tools that are not JSON"),
        ({"query": "q", "response": "a", "tools": [1]}, "tools that are not a list of objects"),
        ({"query": "q", "response": "a", "history": [["only one"]]}, "a history that is not a list"),
    ],
)
def test_refused_rows(columns: dict, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        sample(**columns)
    assert reason in str(caught.value)
