"""Tools and calls as text: golden forms, JSON everywhere, calls read back, spans of the model's own words."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import chat, family_template, jinja_template, trained_text

from swift.config.template import AGENT_TEMPLATES
from swift.template.agents import FORMATS, _reads_back
from swift.template.types import Message, RenderError

FUNCTION = {
    "name": "get_w",
    "description": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
END = "<|im_end|>"
HEADER = "<|im_start|>assistant\n"
XML_FORMS = ("qwen3_coder", "glm4_5")


def call(name: str = "get_w", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def agent_chat(*calls: dict[str, Any], words: str = "") -> list[Message]:
    results = [{"role": "tool", "content": f'{{"t": {i}}}'} for i in range(len(calls))]
    asked = chat("q", words, system="SYS")
    asked[2]["tool_calls"] = list(calls)
    return [*asked, *results, {"role": "assistant", "content": "done"}]


def test_every_choice_has_a_form() -> None:
    assert tuple(FORMATS) == AGENT_TEMPLATES


def test_golden_hermes() -> None:
    template = jinja_template(None, agent_template="hermes")
    text = template.render(
        agent_chat(call(city="BJ"), call(city="北京"), words="Let me see."), tools=TOOLS
    ).text
    system = (
        "SYS\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f'{{"type": "function", "function": {json.dumps(FUNCTION)}}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
    calls = (
        '<tool_call>\n{"name": "get_w", "arguments": {"city": "BJ"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_w", "arguments": {"city": "北京"}}\n</tool_call>'
    )
    responses = '<tool_response>\n{"t": 0}\n</tool_response>\n<tool_response>\n{"t": 1}\n</tool_response>'
    assert text == (
        f"<|im_start|>system\n{system}{END}\n<|im_start|>user\nq{END}\n{HEADER}Let me see.\n{calls}{END}\n"
        f"<|im_start|>user\n{responses}{END}\n{HEADER}done{END}\n"
    )


@pytest.mark.parametrize("words", ["", "Let me see."])
def test_hermes_is_what_qwen_renders_by_itself(words: str) -> None:
    messages = agent_chat(call(city="BJ", n=1), words=words)
    own, ours = family_template("qwen2.5"), family_template("qwen2.5", agent_template="hermes")
    assert ours.render(messages, tools=TOOLS) == own.render(messages, tools=TOOLS)
    assert ours.prompt(messages[:-1], tools=TOOLS) == own.prompt(messages[:-1], tools=TOOLS)
    without_system = messages[1:]
    assert ours.render(without_system, tools=TOOLS) == own.render(without_system, tools=TOOLS)


GOLDEN_CALLS = {
    "hermes": '<tool_call>\n{"name": "get_w", "arguments": {"city": "BJ", "all": true}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=get_w>\n<parameter=city>\nBJ\n</parameter>\n"
    "<parameter=all>\ntrue\n</parameter>\n</function>\n</tool_call>",
    "glm4_5": "<tool_call>get_w\n<arg_key>city</arg_key>\n<arg_value>BJ</arg_value>\n"
    "<arg_key>all</arg_key>\n<arg_value>true</arg_value>\n</tool_call>",
    "llama3": '{"name": "get_w", "parameters": {"city": "BJ", "all": true}}',
    "react_en": 'Action: get_w\nAction Input: {"city": "BJ", "all": true}\nObservation:',
    "react_zh": 'Action: get_w\nAction Input: {"city": "BJ", "all": true}\nObservation:',
}


@pytest.mark.parametrize("name", AGENT_TEMPLATES)
def test_golden_calls_and_what_is_trained(name: str) -> None:
    template = jinja_template(None, agent_template=name)
    messages = agent_chat(call(city="BJ", all=True))
    rendered = template.render(messages, tools=TOOLS)
    end = "" if name.startswith("react") else END
    spans = [rendered.text[span.start : span.end] for span in rendered.spans]
    assert spans == [GOLDEN_CALLS[name] + end, "done" + END]
    assert '"get_w"' in rendered.text or "get_w: weather" in rendered.text  # the tools are told
    assert "'city'" not in rendered.text and "True" not in rendered.text


@pytest.mark.parametrize("name", AGENT_TEMPLATES)
def test_prompt_is_the_beginning_of_the_training_text(name: str) -> None:
    template = jinja_template(None, agent_template=name)
    messages = agent_chat(call(city="BJ"), call(city="SH"), words="Well.")
    rendered = template.render(messages, tools=TOOLS)
    prompt = template.prompt(messages[:-1], tools=TOOLS)
    assert rendered.text.startswith(prompt)
    assert rendered.spans[-1].start == len(prompt)
    assert template.prompt(messages[:2], tools=TOOLS) == rendered.text[: rendered.spans[0].start]


def test_react_keeps_results_inside_one_turn() -> None:
    template = jinja_template(None, agent_template="react_en")
    messages = [*agent_chat(call(city="BJ"), call(city="SH"))[1:-1], *agent_chat(call(city="X"))[2:]]
    text = template.render(messages).text
    assert text == (
        f"<|im_start|>user\nq{END}\n{HEADER}"
        'Action: get_w\nAction Input: {"city": "BJ"}\nAction: get_w\nAction Input: {"city": "SH"}\n'
        'Observation:{"t": 0}\nObservation:{"t": 1}\n'
        'Action: get_w\nAction Input: {"city": "X"}\nObservation:{"t": 0}\n'
        f"done{END}\n"
    )
    assert trained_text(template, messages) == [
        'Action: get_w\nAction Input: {"city": "BJ"}\n'
        'Action: get_w\nAction Input: {"city": "SH"}\nObservation:',
        'Action: get_w\nAction Input: {"city": "X"}\nObservation:',
        "done" + END,
    ]


def test_weights_stay_with_their_message() -> None:
    for name in AGENT_TEMPLATES:
        messages = agent_chat(call(city="BJ"))
        messages[2]["loss"] = False
        assert trained_text(jinja_template(None, agent_template=name), messages) == ["done" + END]
        messages = [*agent_chat(call(city="BJ")), *chat("more", "x")]
        last = jinja_template(None, agent_template=name, loss_scale="last_round")
        assert trained_text(last, messages) == ["x" + END]


def test_llama_form_on_its_own_template_allows_parallel_calls() -> None:
    messages = agent_chat(call(city="BJ"), call(city="SH"))
    with pytest.raises(RenderError, match="single tool-calls"):
        family_template("llama3.1").render(messages, tools=TOOLS)
    trained = trained_text(family_template("llama3.1", agent_template="llama3"), messages, TOOLS)
    two = '{"name": "get_w", "parameters": {"city": "BJ"}}; {"name": "get_w", "parameters": {"city": "SH"}}'
    assert trained == [two + "<|eot_id|>", "done<|eot_id|>"]
    text = family_template("llama3.1", agent_template="llama3").render(messages, tools=TOOLS).text
    assert "<|start_header_id|>ipython<|end_header_id|>" in text


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", AGENT_TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), JSON_VALUES, max_size=3), min_size=1
    )
)
def test_what_is_written_is_read_back(name: str, arguments: list[dict[str, Any]]) -> None:
    form = FORMATS[name]
    calls = [(f"f{i}", values) for i, values in enumerate(arguments[:3])]
    assert _reads_back(form, calls, f"Some words.\n{form.calls(calls)}{END}")


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("hermes", "<tool_call>\n{}\n</tool_call>", "x"),
        ("hermes", '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', "x"),
        ("qwen3_coder", "", "x\n</parameter>\n"),
        ("glm4_5", "", "x</arg_value>\n"),
        ("llama3", '{"name": "g"', "x"),
        ("react_en", "Action: g\nAction Input: none", "x"),
    ],
)
def test_row_whose_call_cannot_be_read_back(name: str, words: str, value: str) -> None:
    messages = agent_chat(call(city=value), words=words)
    with pytest.raises(RenderError, match="a tool call that does not parse back"):
        jinja_template(None, agent_template=name).render(messages, tools=TOOLS)


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "llama3.1"])
def test_calls_of_a_templates_own_form_are_read_back_too(family: str) -> None:
    template = family_template(family)
    assert template.render(agent_chat(call(city="BJ", n=[1, None])), tools=TOOLS).spans
    messages = agent_chat(call(city="BJ"), words="<tool_call>\nnot JSON\n</tool_call>")
    if family != "llama3.1":  # its own template leaves out words beside a call
        with pytest.raises(RenderError, match="does not parse back"):
            template.render(messages, tools=TOOLS)


@pytest.mark.parametrize("name", XML_FORMS)
def test_arguments_that_are_no_object(name: str) -> None:
    messages = agent_chat(call())
    messages[2]["tool_calls"][0]["function"]["arguments"] = [1]
    with pytest.raises(RenderError, match="arguments are not an object"):
        jinja_template(None, agent_template=name).render(messages)


def test_result_without_a_call() -> None:
    messages = [*chat("q"), {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]
    assert trained_text(jinja_template(None), messages) == ["a" + END]
    with pytest.raises(RenderError, match="result without a call"):
        jinja_template(None, agent_template="react_en").render(messages)
    with pytest.raises(RenderError, match="tools without a user's message"):
        jinja_template(None, agent_template="llama3").render(
            [{"role": "assistant", "content": "a"}], tools=TOOLS
        )
