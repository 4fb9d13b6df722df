"""Whole renders, written down: what Qwen models are trained on, trained text between ⟦ and ⟧.

The templates are the real ones. The vocabulary is a small one with the special tokens of Qwen, which changes
ids but neither the text nor what is trained of it. Run as a program, this file writes the goldens anew: look
at the difference.
"""

from pathlib import Path
from typing import Any

import pytest
from template_families import family_template

from swift.template.preview import trained_segments
from swift.template.tokenize import Encoded, encode_chats

GOLDEN = Path(__file__).parents[1] / "data" / "golden_renders"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rom 🙂"}}}


def talk(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CASES: dict[str, tuple[list[dict[str, Any]], list[Any] | None, dict[str, Any]]] = {
    "plain": (talk("Who are you?", "I am Robin."), None, {}),
    "system": (talk("Hi", "Hello! 你好", "And?", "Bye.", system="Be brief."), None, {}),
    "thoughts": (
        talk("1+1?", "<think>\nOne more.\n</think>\n\n2", "2+2?", "<think>\nTwice.\n</think>\n\n4"),
        None,
        {},
    ),
    "last_round": (talk("Hi", "Hello!", "And?", "Bye."), None, {"loss_scale": "last_round"}),
    "empty_think": (
        talk("Hi", "<think>\n\n</think>\n\nHello!"),
        None,
        {"loss_scale": "default+ignore_empty_think"},
    ),
    "tools": (
        [
            *talk("Weather?", system="Help."),
            {"role": "assistant", "content": "I will look.", "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": "21 degrees"},
            {"role": "assistant", "content": "Sunny, 21 degrees."},
        ],
        TOOLS,
        {},
    ),
    "react": (
        [
            *talk("Weather?"),
            {"role": "assistant", "content": "Thought: look.", "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Final Answer: sunny."},
        ],
        TOOLS,
        {"agent_template": "react_en"},
    ),
}


def render(family: str, case: str) -> str:
    messages, tools, flags = CASES[case]
    template = family_template(family, **flags)
    (row,) = encode_chats(template, [messages], tools=[tools], max_length=None, truncation_strategy="delete")
    assert isinstance(row, Encoded), row
    pieces = trained_segments(template.tokenizer, row)
    return "".join(f"⟦{text}⟧" if weight else text for text, weight in pieces)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_render_is_the_golden_one(family: str, case: str) -> None:
    assert render(family, case) == (GOLDEN / f"{family}-{case}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CASES:
        for kind in ("qwen2.5", "qwen3"):
            (GOLDEN / f"{kind}-{name}.txt").write_text(render(kind, name), encoding="utf-8")
