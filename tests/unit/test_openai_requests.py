"""What requests may say, and how refusals read. Over HTTP: tests/e2e/test_deploy.py."""

import pytest
from pydantic import ValidationError

from swift.infer.openai_requests import REFUSED, ApiError, ChatRequest, TextRequest, explain

HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def complaint(body: dict, kind=ChatRequest) -> str:
    with pytest.raises((ApiError, ValidationError)) as caught:
        request = kind.model_validate(body)
        request.read_messages() if kind is ChatRequest else request.prompts
    error = caught.value
    return str(error) if isinstance(error, ApiError) else str(explain(error.errors()))


def test_null_and_neutral_values_ask_for_nothing() -> None:
    neutral = {name: values[0] for name, values in REFUSED.items() if values}
    plain = ChatRequest.model_validate(HELLO)
    assert ChatRequest.model_validate(HELLO | neutral) == plain
    assert ChatRequest.model_validate(HELLO | dict.fromkeys(ChatRequest.model_fields) | HELLO) == plain


@pytest.mark.parametrize("name", REFUSED)
def test_each_of_these_is_refused_by_name(name) -> None:
    told = f"{name} is not supported by this server; leave it out"
    assert complaint(HELLO | {name: "something"}) == told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"messages": [{"role": "robot", "content": ""}]},
            "messages[0].role: Input should be 'system', 'dev",
        ),
        ({"messages": [{"role": "user", "content": "", "colour": 1}]}, "messages[0].colour is not known to"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"model": 5}, "model: Input should be a valid string"),
    ],
)
def test_mistakes_name_their_place(change, message) -> None:
    assert complaint(HELLO | change).startswith(message)


def test_calls_have_json_arguments() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{a}"}}
    body = HELLO | {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert complaint(body) == "messages[0]: arguments of f are not JSON"


def test_messages_become_those_of_templates() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    read = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert ChatRequest.model_validate(HELLO | {"messages": messages}).read_messages() == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n", "tool_calls": [read]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_are_texts_or_tokens(prompt, prompts) -> None:
    assert TextRequest(model="m", prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", ["", [], [""], [[]]])
def test_an_empty_prompt_asks_nothing(prompt) -> None:
    assert complaint({"model": "m", "prompt": prompt}, TextRequest) == "prompt is empty"
