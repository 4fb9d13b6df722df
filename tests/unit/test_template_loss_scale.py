"""--loss_scale and the weights that messages carry themselves."""

import pytest
from template_families import chat, family_template, trained_text

from swift.template.types import Span


def test_last_round_is_everything_after_the_last_question() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        *chat("q1", "a1", "q2"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a2"},
    ]
    trained = trained_text(family_template("qwen2.5", loss_scale="last_round"), messages)
    assert trained == [
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>',
        "a2<|im_end|>",
    ]


def test_all_trains_the_prompt_too() -> None:
    rendered = family_template("qwen2.5", loss_scale="all").render(chat("q", "a"))
    assert rendered.spans == (Span(0, len(rendered.text), 1.0),)


@pytest.mark.parametrize(
    ("loss_scale", "expected"),
    [
        ("default", ["<think>\n\n</think>\n\na<|im_end|>", "<think>x</think>b<|im_end|>"]),
        ("ignore_empty_think", ["a<|im_end|>", "<think>x</think>b<|im_end|>"]),
        ("last_round+ignore_empty_think", ["<think>x</think>b<|im_end|>"]),
    ],
)
def test_empty_thinking(loss_scale: str, expected: list[str]) -> None:
    messages = chat("q", "<think>\n\n</think>\n\na", "q2", "<think>x</think>b")
    assert trained_text(family_template("smollm2", loss_scale=loss_scale), messages) == expected


def test_empty_thinking_in_the_middle_splits_the_span() -> None:
    messages = chat("q", "a <think> </think> b")
    trained = trained_text(family_template("smollm2", loss_scale="ignore_empty_think"), messages)
    assert trained == ["a ", "b<|im_end|>"]


def test_messages_carry_their_own_weight() -> None:
    messages = chat("q1", "a1", "q2", "a2", "q3", "a3")
    messages[1]["loss"] = False
    messages[3]["loss_scale"] = 0.5
    rendered = family_template("smollm2").render(messages)
    assert [(rendered.text[s.start : s.end], s.weight) for s in rendered.spans] == [
        ("a2<|im_end|>", 0.5),
        ("a3<|im_end|>", 1.0),
    ]


def test_message_wins_over_the_flag() -> None:
    messages = chat("q1", "a1", "q2", "a2")
    messages[1]["loss"] = True
    assert trained_text(family_template("smollm2", loss_scale="last_round"), messages) == [
        "a1<|im_end|>",
        "a2<|im_end|>",
    ]
    messages[3]["loss_scale"] = 0
    assert trained_text(family_template("smollm2", loss_scale="last_round"), messages) == ["a1<|im_end|>"]
