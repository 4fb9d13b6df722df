"""--loss_scale and the weights that messages carry themselves."""

import pytest
from template_families import chat, family_template, trained_text

from swift.config.option import ConfigError
from swift.plugins.hooks import LossScale, loss_scale_map
from swift.template.chat import ChatTemplate
from swift.template.loss_scale import build_weights
from swift.template.types import Message, RenderError, Span


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


END = "<|im_end|>"


def weighed(template: ChatTemplate, messages: list[Message]) -> list[tuple[str, float]]:
    rendered = template.render(messages)
    return [(rendered.text[span.start : span.end], span.weight) for span in rendered.spans]


def test_old_name_of_a_chain() -> None:
    new = build_weights("last_round+ignore_empty_think")
    assert build_weights("last_round_with_ignore_empty_think") == new
    assert (new.base, [name for name, _ in new.parts]) == ("last_round", ["ignore_empty_think"])


REACT = "Thought: t\nAction: f\nAction Input: {}\nObservation: 3\nThought: ok\nFinal Answer: 3"


@pytest.mark.parametrize(
    ("loss_scale", "answer", "expected"),
    [
        (
            "react",
            REACT,
            [
                ("Thought: t\n", 1.0),
                ("Action: f\nAction Input: {}\nObservation:", 2.0),
                ("Thought: ok\nFinal Answer: 3" + END, 1.0),
            ],
        ),
        (
            "hermes",
            "so\n<tool_call>\n{}\n</tool_call>",
            [("so\n", 1.0), ("<tool_call>\n{}\n</tool_call>", 2.0), (END, 1.0)],
        ),
        (
            "qwen",
            "a✿FUNCTION✿: f✿RESULT✿: r✿RETURN✿: x",
            [("a", 1.0), ("✿FUNCTION✿: f✿RESULT✿:", 2.0), ("✿RETURN✿: x" + END, 1.0)],
        ),
        (
            "alpha_umi",
            "Thought: t\nNext: caller.",
            [("Thought: t\n", 1.0), ("Next: caller.", 2.0), (END, 1.0)],
        ),
        (
            "agentflan",
            "Thought: t\nAction: f\nObservation: r",
            [("Thought: t\nAction:", 1.0), (" f\n", 3.0), ("Observation:", 2.0), (END, 1.0)],
        ),
        # What ends the turn is trained even where the words before it are not.
        ("react", "Observation: 3", [("Observation:", 2.0), (END, 1.0)]),
        ("react", "plain words", [("plain words" + END, 1.0)]),
    ],
)
def test_weights_of_agents(loss_scale: str, answer: str, expected: list) -> None:
    assert weighed(family_template("smollm2", loss_scale=loss_scale), chat("q", answer)) == expected


def test_some_questions_weigh_their_whole_answer() -> None:
    template = family_template("smollm2", loss_scale="agentflan")
    chats = chat("What is the tool you want to use?", "Thought: f", "And now?", "Thought: f")
    assert weighed(template, chats) == [("Thought: f", 3.0), (END, 1.0), ("Thought: f" + END, 1.0)]


def test_chain_multiplies() -> None:
    call = "<tool_call>x</tool_call>"
    messages = chat("q", call, "q2", f"<think>\n\n</think>\n\n{call} done")
    messages[3]["loss_scale"] = 0.5
    chain = family_template("smollm2", loss_scale="last_round+hermes+ignore_empty_think")
    assert weighed(chain, messages) == [(call, 1.0), (" done" + END, 0.5)]
    binary = family_template("smollm2", loss_scale="hermes+ignore_empty_think", is_binary_loss_scale=True)
    assert weighed(binary, messages) == [(call + END, 1.0), (call + " done" + END, 1.0)]


class Shout(LossScale):
    """Words in capitals count three times, but not where the question forbids it."""

    def get_loss_scale(self, context: str, query: str) -> tuple[list[str], list[float]]:
        if "bad" in query:
            return ["x"], [1.0]
        if "broken" in query:
            raise KeyError("k")
        words = [word + " " for word in context.split(" ")]
        words[-1] = words[-1][:-1]
        return words, [0.0 if "off" in query else 3.0 if word.isupper() else 1.0 for word in words]


@pytest.mark.parametrize("value", [Shout, Shout()])
def test_weights_of_a_plugin(monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    monkeypatch.setitem(loss_scale_map, "shout", value)
    template = family_template("smollm2", loss_scale="shout")
    messages = chat("q", "so IT is", "turn it off", "GONE")
    assert weighed(template, messages) == [("so ", 1.0), ("IT ", 3.0), ("is" + END, 1.0), (END, 1.0)]
    with pytest.raises(RenderError, match="--loss_scale shout returns parts that are not the answer"):
        template.render(chat("bad", "a"))
    with pytest.raises(RenderError, match="--loss_scale shout fails: KeyError: 'k'"):
        template.render(chat("broken", "a"))


class OldShape(LossScale):
    def get_loss_scale(self, context, context_type, is_last_round):  # type: ignore[override]
        return [context], [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ignore_empty_thinks", "no --loss_scale is called ignore_empty_thinks"),
        ("last_round+herms", "no --loss_scale is called herms"),
        ("old", "--loss_scale old: OldShape.get_loss_scale does not take (context, query)"),
        ("text", "--loss_scale text: int is not a LossScale"),
    ],
)
def test_names_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setitem(loss_scale_map, "old", OldShape)
    monkeypatch.setitem(loss_scale_map, "text", 7)
    with pytest.raises(ConfigError) as caught:
        build_weights(name)
    assert caught.value.message == message
    if name.endswith("herms"):
        assert caught.value.hint.startswith("did you mean hermes? known: agentflan, all, alpha_umi, default")
