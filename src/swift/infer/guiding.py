"""Answers that must have a form, JSON of a schema or calls of tools: grammars that tokens have to follow.

Owns: the grammars, in llguidance's dialect of Lark (https://github.com/guidance-ai/llguidance), and what
stands between its matchers and the decoder. Not here: what a request may say (openai_requests.py).
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from swift.infer.openai_answers import THINK, THOUGHT
from swift.infer.openai_requests import ApiError, ChatRequest
from swift.rollout.types import Guide
from swift.template.agents import AgentFormat
from swift.template.chat import ChatTemplate

# One line, as most models write JSON to programs: where spaces are free, a model may write them for ever.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT: dict[str, Any] = {"type": "object"}
KEY, VALUE = "zqkey", "zqvalue"
# Thoughts end at their mark and not later; of what follows, a model may set off what it was asked for.
THOUGHTS = r"thought[lazy]: /{}(?s:.*)<\/think>/" + "\nBREAK: /[ \\n]{{1,2}}/\n"
ONE_LINE = r"/[^<\n]+/"
quote = partial(json.dumps, ensure_ascii=False)  # texts as Lark writes them
PREFIXES = {"none": "", "open": "thought BREAK? ", "may": "(thought BREAK?)? "}


class Follower:
    """Implements `swift.rollout.types.Guide`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def allowed(self) -> Tensor:
        """At the end, only what ends an answer."""
        return torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0

    def take(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)


def load_vocabulary(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> LLTokenizer:
    """What grammars are matched against; takes a second for large vocabularies. Raises ApiError."""
    if not tokenizer.is_fast:
        raise ApiError(400, "the model's tokenizer is a slow one, which no form can be asked of")
    return from_tokenizer(tokenizer, eos_token=list(ends))


def compile_grammar(grammar: str, vocabulary: LLTokenizer) -> Callable[[], Guide]:
    """Makes a guide for each answer. Raises ApiError for a schema that the library cannot follow."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    if matcher.is_error():
        first = matcher.get_error().splitlines()[0]
        raise ApiError(400, f"a schema cannot be followed: {first.partition(': ')[2] or first}")
    return lambda: Follower(matcher.deep_copy())


def choose_grammar(request: ChatRequest, template: ChatTemplate, prompt: str) -> str | None:
    """The grammar of what is asked for; None = any text. Where JSON is asked for, tools may be called."""
    forced = request.forced_tools()
    schema = None if forced else request.response_format.schema_
    if schema is None and not forced:
        return None
    if forced and template.calls is None:
        raise ApiError(
            400, "tool_choice: the model's template writes calls in a form that is not known",
            param="tool_choice",
        )  # fmt: skip
    end = prompt.rstrip()
    thinks = THINK in template.source and not end.endswith(THOUGHT)
    try:
        return write_grammar(
            schema=schema, tools=forced or request.read_tools() or (), form=template.calls,
            several=request.parallel_tool_calls and not isinstance(request.tool_choice, dict),
            thoughts="open" if end.endswith(THINK) else "may" if thinks else "none",
        )  # fmt: skip
    except (AttributeError, TypeError) as error:
        raise ApiError(400, "tools: parameters are no JSON schema", param="tools") from error


def write_grammar(
    *,
    schema: dict[str, Any] | None,
    tools: Sequence[dict[str, Any]],
    form: AgentFormat | None,
    several: bool,
    thoughts: str,
) -> str:
    """The grammar of an answer that is JSON of `schema` or calls of `tools`, of which one has to be given.

    `several`: calls may follow each other. `thoughts`: "open" where the prompt has begun them already, "may"
    where the model may, "none".
    """
    kinds, rules = [], []
    if schema is not None:
        kinds, rules = ["answer"], [f"answer: {_json_of(schema)}"]
    if tools and form:
        write = _typed_call if form.typed else _tagged_call
        rules += [write(f"call{number}", tool["function"], form) for number, tool in enumerate(tools)]
        rules.append("call: " + " | ".join(f"call{number}" for number in range(len(tools))))
        kinds.append(f"call ({_between(form)} call)*" if several else "call")
    if thoughts != "none":
        rules.append(THOUGHTS.format("" if thoughts == "open" else THINK))
    return "\n".join([f"start: {PREFIXES[thoughts]}({' | '.join(kinds)})", *rules])


def _json_of(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': SPACING})}"


def _between(form: AgentFormat) -> str:
    """What the form puts between two calls."""
    one, two = (form.calls([(KEY, {})] * count) for count in (1, 2))
    return quote(two[len(one) : -len(one)])


def _typed_call(rule: str, function: dict[str, Any], form: AgentFormat) -> str:
    """A call as the form writes it, around arguments of the function's schema."""
    before, _, after = form.calls([(function["name"], {KEY: VALUE})]).partition(json.dumps({KEY: VALUE}))
    values = _json_of(function.get("parameters") or ANY_OBJECT)
    end = quote(after) if after else ""
    return f"{rule}: {quote(before)} {rule}_values {end}\n{rule}_values: {values}"


def _tagged_call(rule: str, function: dict[str, Any], form: AgentFormat) -> str:
    """A call of a form that writes each argument by itself: in the order of the schema, texts of one line."""
    schema = function.get("parameters") or ANY_OBJECT
    empty, whole = (form.calls([(function["name"], given)]) for given in ({}, {KEY: VALUE}))
    start = next(i for i, pair in enumerate(zip(empty, whole, strict=False)) if pair[0] != pair[1])
    pair = whole[start : start + len(whole) - len(empty)]
    parts, rules = [quote(empty[:start])], []
    for number, (key, value) in enumerate((schema.get("properties") or {}).items()):
        before, after = pair.replace(KEY, key).split(VALUE)
        own = f"{rule}_{number}"
        is_text = value.get("type", "string") == "string" and "enum" not in value
        rules.append(f"{own}: {quote(before)} {own}_value {quote(after)}")
        rules.append(f"{own}_value: {ONE_LINE if is_text else _json_of(value)}")
        parts.append(own if key in schema.get("required", ()) else f"{own}?")
    return "\n".join([f"{rule}: {' '.join(parts)} {quote(empty[start:])}", *rules])
