"""Grammars of answers that must have a form. Over HTTP: tests/e2e/test_deploy.py."""

import json
from collections.abc import Callable

import pytest
import torch

from swift.infer.guiding import compile_grammar, load_vocabulary, write_grammar
from swift.infer.openai_requests import ApiError
from swift.rollout.types import Guide
from swift.template.agents import FORMATS

WHERE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WHERE}},
    {"type": "function", "function": {"name": "现在"}},
]
BEFORE = {"none": "", "may": "<think>\nhm </th\n</think>\n\n", "open": "\nhm\n</think>\n\n"}


@pytest.fixture(scope="module")
def compiled(tiny_tokenizer) -> Callable[..., Callable[[], Guide]]:
    vocabulary = load_vocabulary(tiny_tokenizer, [2])

    def build(**asked: object) -> Callable[[], Guide]:
        chosen = {"schema": None, "tools": (), "form": None, "several": True, "thoughts": "none"} | asked
        return compile_grammar(write_grammar(**chosen), vocabulary)

    return build


@pytest.fixture(scope="module")
def accepts(tiny_tokenizer) -> Callable[[Callable[[], Guide], str], bool]:
    """Whether an answer of this text may be given, and end there."""

    def follow(make: Callable[[], Guide], text: str) -> bool:
        guide = make()
        for token in [*tiny_tokenizer(text, add_special_tokens=False).input_ids, tiny_tokenizer.eos_token_id]:
            if not guide.allowed()[token]:
                return False
            guide.take(token)
        return True

    return follow


@pytest.mark.parametrize("thoughts", BEFORE)
@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_those_that_the_form_writes(name, thoughts, compiled, accepts) -> None:
    form, before = FORMATS[name], BEFORE[thoughts]
    make = compiled(tools=TOOLS, form=form, thoughts=thoughts)
    once = compiled(tools=TOOLS, form=form, thoughts=thoughts, several=False)
    one, two = [("weather", {"city": "Paris", "days": 3})], [("weather", {"city": "Rome"}), ("现在", {})]
    assert accepts(make, before + form.calls(one)) and accepts(once, before + form.calls(one))
    assert accepts(make, before + form.calls(two)) and not accepts(once, before + form.calls(two))
    assert accepts(make, form.calls(one)) == (thoughts != "open")
    for wrong in ([("other", {})], [("weather", {"days": 3})], [("weather", {"city": "a", "days": "b"})]):
        assert not accepts(make, before + form.calls(wrong))
    assert not accepts(make, before + "No.")


def test_json_of_a_schema_or_a_call(compiled, accepts) -> None:
    make = compiled(schema=WHERE, tools=TOOLS, form=FORMATS["hermes"])
    assert accepts(make, json.dumps({"city": "Paris"}))
    assert accepts(make, FORMATS["hermes"].calls([("现在", {})]))
    assert not accepts(make, json.dumps({"city": 5})) and not accepts(make, "Paris")


def test_guides_of_one_grammar_are_apart(compiled, tiny_tokenizer) -> None:
    make = compiled(schema={"enum": ["ab"]})
    first, second = make(), make()
    before = second.allowed()
    for token in tiny_tokenizer('"ab"').input_ids:
        first.take(token)
    assert torch.equal(second.allowed(), before) and not before[2]
    assert first.allowed().nonzero().flatten().tolist() == [2]
    assert first.allowed().dtype == torch.bool and len(first.allowed()) == len(tiny_tokenizer)


def test_a_schema_that_cannot_be_followed(compiled) -> None:
    with pytest.raises(ApiError, match="a schema cannot be followed: failed to compile JSON schema: Unimpl"):
        compiled(schema={"not": {"type": "string"}})
