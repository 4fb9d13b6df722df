"""Rows of pairs, of liked answers and of prompts, in the spellings of earlier tools and of TRL."""

from typing import Any

import pytest

from swift.data.preference import to_kto, to_preference, to_prompt
from swift.data.types import Row, RowError, Sample


def row(**columns: Any) -> Row:
    return Row(columns, "f.jsonl", 3)


def said(*turns: str) -> list[dict[str, str]]:
    roles = {"s": "system", "q": "user", "a": "assistant", "b": "assistant"}
    return [{"role": roles[turn[0]], "content": turn} for turn in turns]


def words(sample: Sample) -> list[str]:
    return [message["content"] for message in sample.messages]


@pytest.mark.parametrize(
    ("columns", "chosen", "rejected"),
    [
        ({"messages": said("q", "a"), "rejected_response": "b"}, ["q", "a"], ["q", "b"]),
        ({"query": "q", "response": "a", "rejected_response": "b"}, ["q", "a"], ["q", "b"]),
        (
            {"messages": said("s", "q", "a", "q2", "a2"), "rejected_response": said("b", "q3", "b3")},
            ["s", "q", "a", "q2", "a2"],
            ["s", "q", "a", "q2", "b", "q3", "b3"],
        ),
        ({"messages": said("q", "a"), "rejected_messages": said("q2", "b")}, ["q", "a"], ["q2", "b"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["q", "a"], ["q", "b"]),
        (
            {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
            ["s", "q", "a"],
            ["s", "q", "b"],
        ),
        (
            {"prompt": said("s", "q"), "chosen": said("a"), "rejected": said("b")},
            ["s", "q", "a"],
            ["s", "q", "b"],
        ),
        ({"prompt": said("s", "q"), "chosen": "a", "rejected": "b"}, ["s", "q", "a"], ["s", "q", "b"]),
        ({"chosen": said("q", "a"), "rejected": said("q", "b")}, ["q", "a"], ["q", "b"]),
        # The prompt again in the answers, and the chosen one again as messages.
        (
            {"prompt": "q", "chosen": said("q", "a"), "rejected": said("q", "b"), "messages": said("q", "a")},
            ["q", "a"],
            ["q", "b"],
        ),
        (
            {"prompt": said("s", "q"), "chosen": said("q", "a"), "rejected": said("s", "q", "b")},
            ["s", "q", "a"],
            ["s", "q", "b"],
        ),
        (
            {"chosen": str(said("q", "a")).replace("'", '"'), "rejected": said("q", "b")},
            ["q", "a"],
            ["q", "b"],
        ),
        ({"prompt": "q", "chosen": said("a")[0], "rejected": said("b")[0]}, ["q", "a"], ["q", "b"]),
    ],
)
def test_pairs(columns: dict, chosen: list[str], rejected: list[str]) -> None:
    pair = to_preference(row(**columns, score=[1, None], margin="0.5"))
    better, worse = pair.samples
    assert (words(better), words(worse), pair.values) == (chosen, rejected, (0.5,))
    assert better.extra == {"score": [1, None]} and worse.extra == {}
    assert (worse.file, worse.line) == ("f.jsonl", 3)


def test_tools_of_a_pair() -> None:
    tools, others = [{"name": "f"}], [{"name": "g"}]
    pair = to_preference(row(prompt="q", chosen="a", rejected="b", tools=tools))
    assert [s.tools for s in pair.samples] == [[{"type": "function", "function": {"name": "f"}}]] * 2
    assert pair.values == (0.0,) and pair.samples[0].extra == {}
    columns = {"messages": said("q", "a"), "rejected_messages": said("q", "b"), "tools": tools}
    pair = to_preference(row(**columns, rejected_tools=others))
    assert [s.tools[0]["function"]["name"] for s in pair.samples] == ["f", "g"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"messages": said("q", "a")}, "no rejected answer"),
        ({"messages": said("q", "a"), "rejected_response": ""}, "no rejected answer"),
        ({"messages": said("q", "a"), "rejected_response": "a"}, "chosen and rejected are the same"),
        ({"messages": said("q"), "rejected_response": "b"}, "chosen does not end with an assistant message"),
        ({"prompt": "q", "chosen": "a"}, "chosen and rejected do not both have an answer"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "chosen and rejected do not both have an answer"),
        ({"chosen": "a", "rejected": "b"}, "chosen and rejected without a prompt"),
        (
            {"prompt": "q", "chosen": said("q2", "a"), "rejected": said("q2", "b")},
            "chosen or rejected does not begin with the prompt",
        ),
        (
            {"chosen": said("q", "a"), "rejected": said("q")},
            "rejected does not end with an assistant message",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}, "a margin that is not a number"),
    ],
)
def test_refused_pairs(columns: dict, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_preference(row(**columns))
    assert str(caught.value) == reason


@pytest.mark.parametrize(("label", "liked"), [(True, True), ("False", False), (0, False), ("1", True)])
def test_kto(label: Any, liked: bool) -> None:
    for columns in ({"messages": said("q", "a")}, {"prompt": "q", "completion": "a"}):
        found = to_kto(row(**columns, label=label, x=1))
        (sample,) = found.samples
        assert (words(sample), found.values, sample.extra) == (["q", "a"], (float(liked),), {"x": 1})


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"messages": said("q", "a")}, "no label"),
        ({"messages": said("q", "a"), "label": "good"}, "a label that is not true or false"),
        ({"messages": said("q"), "label": True}, "no assistant message at the end"),
    ],
)
def test_refused_kto_rows(columns: dict, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        to_kto(row(**columns))


def test_prompts() -> None:
    found = to_prompt(row(messages=said("s", "q", "a"), solution="4", nums=[1]))
    assert words(found.sample) == ["s", "q"]
    assert found.answer == {"role": "assistant", "content": "a"}
    assert found.sample.extra == {"solution": "4", "nums": [1]}
    found = to_prompt(row(problem="q", solution="a", teacher_prompt="t"))
    assert (words(found.sample), found.sample.extra) == (["q"], {"solution": "a", "teacher_prompt": "t"})
    assert to_prompt(row(prompt=said("s", "q"))).answer is None
    with pytest.raises(RowError, match="no question"):
        to_prompt(row(text="raw"))
    for read in (to_prompt, to_kto, to_preference):
        with pytest.raises(RowError, match=r"^p$"):
            read(Row({}, "f", 1, "p"))
