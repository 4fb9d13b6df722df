"""Tools, calls of tools and their results as text, in the forms that models have been taught.

Owns: one entry of FORMATS per form (what is told about the tools, how calls are written and read back), the
change of a conversation with tools into one without, the check that calls survive. Used where a model's own
template shows no tools, or by --agent_template. Not here: rendering (chat.py).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from swift.template.jinja import Renderer
from swift.template.specs import read_spec
from swift.template.types import Message, RenderError

Call = tuple[str, Any]  # name, arguments

_CALL_ID = "zqcall123"  # nine characters, which Mistral's templates insist on
_OBSERVATION = "\nObservation:"
_REACT_CALL = re.compile(r"Action: (.+)\nAction Input: ")
_JSON_CALL = re.compile(r'(?=\{"name": )')


@dataclass(frozen=True, slots=True)
class AgentFormat:
    """One form. `tools` is told before the conversation; `calls` follow the words of an answer."""

    tools: Callable[[list[Any]], str]
    calls: Callable[[list[Call]], str]
    parse: Callable[[str], list[Call]]  # may raise ValueError
    response: str = "<tool_response>\n{}\n</tool_response>"
    response_role: str = "user"
    tools_in: str = "system"  # or "user": before the first question
    typed: bool = True  # no = values are written as text, 5 like "5"
    continues: bool = False  # results stand inside the assistant's turn, which then goes on


def with_agent(
    form: AgentFormat, messages: Sequence[Message], tools: list[Any] | None, default_system: str
) -> list[Message]:
    """The conversation without tools and calls: they have become words. No message is changed in place.

    An assistant's turn that holds results has "parts", [(text, is the assistant's own)].
    """
    changed: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            _add_result(changed, form, message)
        elif message["role"] == "assistant":
            _add_answer(changed, form, message)
        else:
            changed.append(message)
    if not tools:
        return changed
    told = form.tools(tools)
    if form.tools_in == "system":
        system = default_system
        if changed and changed[0]["role"] == "system":
            system = changed.pop(0)["content"]
        return [{"role": "system", "content": f"{system}\n\n{told}" if system else told}, *changed]
    first = next((i for i, message in enumerate(changed) if message["role"] == "user"), None)
    if first is None:
        raise RenderError("tools without a user's message")
    changed[first] = {**changed[first], "content": f"{told}\n\n{changed[first]['content']}"}
    return changed


def _add_answer(changed: list[Message], form: AgentFormat, message: Message) -> None:
    calls, words = _calls_of(message), message["content"]
    if calls:
        words = f"{words}\n{form.calls(calls)}" if words else form.calls(calls)
        words += _OBSERVATION if form.continues else ""
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    if changed and changed[-1].get("parts", [("", True)])[-1][1] is False:  # goes on after a result
        plain = changed.pop()
        parts = [*plain["parts"], (words, True)]
    else:
        parts = [(words, True)]
    # Without a result after it, this is an ordinary answer.
    keys = {"parts": parts} if "parts" in plain else {}
    changed.append({**plain, "content": "".join(text for text, _ in parts), **keys})


def _add_result(changed: list[Message], form: AgentFormat, message: Message) -> None:
    before = changed[-1] if changed else None
    if form.continues:
        if before is None or before["role"] != "assistant":
            raise RenderError("a tool's result without a call before it")
        parts = before.get("parts") or [(before["content"], True)]
        again = "" if parts[-1][1] and parts[-1][0].endswith(_OBSERVATION) else _OBSERVATION.lstrip()
        parts = [*parts, (f"{again}{message['content']}\n", False)]
        changed[-1] = {**before, "content": "".join(text for text, _ in parts), "parts": parts}
        return
    result = form.response.format(message["content"])
    if before is not None and before.get("is_result"):
        changed[-1] = {**before, "content": f"{before['content']}\n{result}"}
    else:
        changed.append({"role": form.response_role, "content": result, "is_result": True})


def split_turns(
    text: str, turns: Sequence[tuple[int, int]], messages: Sequence[Message]
) -> list[tuple[int, int]]:
    """One turn per answer where answers have been put into one turn with results between them."""
    split: list[tuple[int, int]] = []
    answers = [message for message in messages if message["role"] == "assistant"]
    for message, (start, end) in zip(answers, turns, strict=True):
        if "parts" not in message:
            split.append((start, end))
            continue
        content = message["content"]
        position = text.find(content.strip(), start, end) - (len(content) - len(content.lstrip()))
        if position < 0:
            raise RenderError("the chat template changes an answer with a tool's result in it")
        places = []
        for part, is_own in message["parts"]:
            if is_own:
                places.append([position, position + len(part)])
            position += len(part)
        places[0][0] = start  # with what the template puts before the words
        if message["parts"][-1][1]:
            places[-1][1] = end
        split += [(first, last) for first, last in places]
    return split


def check_calls(
    form: AgentFormat, messages: Sequence[Message], text: str, turns: Sequence[tuple[int, int]]
) -> None:
    """Raises RenderError where a call cannot be read back from what the model is trained to write."""
    answers = [message for message in messages if message["role"] == "assistant"]
    for message, (start, end) in zip(answers, turns, strict=True):
        calls = _calls_of(message)
        if calls and not _reads_back(form, calls, text[start:end]):
            raise RenderError("a tool call that does not parse back")


def _reads_back(form: AgentFormat, calls: list[Call], text: str) -> bool:
    try:
        found = form.parse(text)
    except (ValueError, KeyError, TypeError):
        return False
    if not form.typed:
        calls = [(name, _text_values(arguments)) for name, arguments in calls]
    return found == calls


def learn_agent(renderer: Renderer) -> tuple[bool, AgentFormat | None]:
    """Whether a template shows tools and their calls, and the form in which it writes calls if we know it."""
    function = {"name": "zqtool", "description": "zqwhat", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    call = {"type": "function", "function": {"name": "zqtool", "arguments": {"zqkey": "zqvalue"}}}
    messages: list[Message] = [
        {"role": "user", "content": "zquser"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": _CALL_ID, **call}]},
        {"role": "tool", "content": "zqresult", "tool_call_id": _CALL_ID},
        {"role": "assistant", "content": "zqanswer"},
    ]
    try:
        told = renderer.text(messages[:1], tools)
        text = renderer.text(messages, tools).partition("zquser")[2]
    except RenderError:
        return False, None
    shown = "zqtool" in told and all(word in text for word in ("zqtool", "zqvalue", "zqresult"))
    calls = _calls_of(messages[1])
    known = (form for form in FORMATS.values() if _reads_back(form, calls, text))
    return shown, next(known, None) if shown else None


def choose_agent(renderer: Renderer, name: str | None) -> tuple[AgentFormat | None, AgentFormat | None]:
    """(form that is used instead of the template's own, form in which calls are read back)."""
    shown, own = learn_agent(renderer)
    if name is None and shown:
        return None, own
    form = FORMATS[name or "hermes"]
    if form.response_role == "tool" and not _shows_results(renderer):
        form = dataclasses.replace(form, response_role="user")
    return form, form


def _shows_results(renderer: Renderer) -> bool:
    roles = ("user", "assistant", "tool")
    try:
        return "zqtool" in renderer.text([{"role": role, "content": f"zq{role}"} for role in roles])
    except RenderError:
        return False


def _calls_of(message: Message) -> list[Call]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(function["name"], function["arguments"]) for function in functions]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _told(spec: str, tools: list[Any]) -> str:
    """What is told about tools, with their descriptions, a line each."""
    return read_spec(spec).replace("@TOOLS@", "\n".join(map(_json, tools)))


def _text_values(arguments: Any) -> dict[str, str]:
    """Values as the forms without types write them: texts as they are, everything else as JSON."""
    if not isinstance(arguments, dict):
        raise RenderError("a tool call whose arguments are not an object")
    return {key: value if isinstance(value, str) else _json(value) for key, value in arguments.items()}


def _hermes_calls(calls: list[Call]) -> str:
    bodies = (_json({"name": name, "arguments": arguments}) for name, arguments in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def _parse_hermes(text: str) -> list[Call]:
    bodies = map(json.loads, re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL))
    return [(body["name"], body["arguments"]) for body in bodies]


@dataclass(frozen=True, slots=True)
class _Tagged:
    """Calls as a name and an element for each argument. {0}, {1}: the name and the arguments, or a pair."""

    call: str
    pair: str

    def write(self, calls: list[Call]) -> str:
        texts = []
        for name, arguments in calls:
            pairs = _text_values(arguments).items()
            texts.append(self.call.format(name, "".join(self.pair.format(*pair) for pair in pairs)))
        return "\n".join(texts)

    def read(self, text: str) -> list[Call]:
        call, pair = (_pattern(form) for form in (self.call, self.pair))
        return [(name, dict(pair.findall(body))) for name, body in call.findall(text)]


def _pattern(form: str) -> re.Pattern[str]:
    """What finds the two things that were put into `form`."""
    return re.compile("(.*?)".join(map(re.escape, re.split(r"\{\d\}", form))), re.DOTALL)


_QWEN_CODER = _Tagged(
    "<tool_call>\n<function={0}>\n{1}</function>\n</tool_call>", "<parameter={0}>\n{1}\n</parameter>\n"
)
_GLM = _Tagged("<tool_call>{0}\n{1}</tool_call>", "<arg_key>{0}</arg_key>\n<arg_value>{1}</arg_value>\n")


def _llama_tools(tools: list[Any]) -> str:
    told = "\n\n".join(json.dumps(tool, ensure_ascii=False, indent=4) for tool in tools)
    return read_spec("llama3.txt").replace("@TOOLS@", told)


def _llama_calls(calls: list[Call]) -> str:
    return "; ".join(_json({"name": name, "parameters": arguments}) for name, arguments in calls)


def _parse_llama(text: str) -> list[Call]:
    return [(body["name"], body["parameters"]) for _, body in _read_json(text, _JSON_CALL)]


def _read_json(text: str, before: re.Pattern[str]) -> Iterator[tuple[re.Match[str], Any]]:
    """Every match of `before` that no earlier value holds, with the JSON value that follows it."""
    decoder, position = json.JSONDecoder(), 0
    while match := before.search(text, position):
        value, position = decoder.raw_decode(text, match.end())
        yield match, value


def _react_tools(spec: str, tools: list[Any]) -> str:
    functions = [tool["function"] for tool in tools]
    told = "\n\n".join(
        f"{f['name']}: {f.get('description', '')} Parameters: {_json(f.get('parameters', {}))}"
        for f in functions
    )
    names = ",".join(f["name"] for f in functions)
    return read_spec(spec).replace("@TOOLS@", told).replace("@NAMES@", names)


def _react_calls(calls: list[Call]) -> str:
    return "\n".join(f"Action: {name}\nAction Input: {_json(arguments)}" for name, arguments in calls)


def _parse_react(text: str) -> list[Call]:
    return [(match.group(1), arguments) for match, arguments in _read_json(text, _REACT_CALL)]


FORMATS = {
    "hermes": AgentFormat(partial(_told, "hermes.txt"), _hermes_calls, _parse_hermes),
    "qwen3_coder": AgentFormat(
        partial(_told, "qwen3_coder.txt"), _QWEN_CODER.write, _QWEN_CODER.read, typed=False
    ),
    "glm4_5": AgentFormat(partial(_told, "glm4_5.txt"), _GLM.write, _GLM.read, typed=False),
    "llama3": AgentFormat(
        _llama_tools, _llama_calls, _parse_llama, response="{}", response_role="tool", tools_in="user"
    ),
    "react_en": AgentFormat(
        partial(_react_tools, "react_en.txt"), _react_calls, _parse_react, continues=True
    ),
    "react_zh": AgentFormat(
        partial(_react_tools, "react_zh.txt"), _react_calls, _parse_react, continues=True
    ),
}
