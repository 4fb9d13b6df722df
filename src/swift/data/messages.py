"""Lists of messages in the spellings that data sets use, as one: roles system, user, assistant and tool.

Not here: rows whose columns are not a list of messages (formats.py).
"""

import json
from collections.abc import Sequence
from typing import Any

from swift.data.types import RowError
from swift.template.types import Message

_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt", "bot")
_CALL = ("tool_call", "function_call")
_TOOL = ("tool", "tool_response", "observation", "observations", "function_response")
_CALL_ROLE = "tool_call"

_ROLES = {
    "system": "system",
    **dict.fromkeys(_USER, "user"),
    **dict.fromkeys(_ASSISTANT, "assistant"),
    **dict.fromkeys(_CALL, _CALL_ROLE),
    **dict.fromkeys(_TOOL, "tool"),
}

_WEIGHT_KEYS = ("loss", "loss_scale")
_KEPT_KEYS = (*_WEIGHT_KEYS, "reasoning_content", "name", "tool_call_id")


def parse_messages(value: Any) -> list[Message]:
    """Our messages from a list (or its JSON text) of messages or of {"human": ..., "assistant": ...}."""
    value = parse_json(value, "messages")
    if not isinstance(value, list) or not value:
        raise RowError("messages that are not a list" if value else "no messages")
    messages: list[Message] = []
    for item in value:
        if not isinstance(item, dict):
            raise RowError("a message that is not an object")
        role = item.get("role") or item.get("from")
        if role is None:
            for user_or_assistant, content in _split_pair(item):
                add_message(messages, user_or_assistant, content)
            continue
        known = _ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            raise RowError(f"unknown role {role!r}")
        content = item["content"] if "content" in item else item.get("value")
        if known == _CALL_ROLE:
            _add_calls(messages, _parse_calls(parse_json(content, "a tool call")), item)
        else:
            add_message(messages, known, content, item)
    return messages


def add_message(messages: list[Message], role: str, content: Any, item: dict[str, Any] | None = None) -> None:
    """Appends a message, or joins it to the one before where user or assistant speak twice in a row."""
    message: Message = {"role": role, "content": ""}
    if item is not None and (len(item) > 2 or "tool_calls" in item):
        message.update({key: item[key] for key in _KEPT_KEYS if item.get(key) is not None})
        _check_weights(message)
        if role == "assistant" and item.get("tool_calls"):
            message["tool_calls"] = _parse_calls(parse_json(item["tool_calls"], "tool calls"))
    if content is not None or "tool_calls" not in message:
        message["content"] = parse_text(content, role)
    if role == "assistant" and not message["content"] and "tool_calls" not in message:
        raise RowError("an assistant message without content")
    if messages and _joins(messages[-1], message):
        before = messages[-1]
        message["content"] = "\n".join(part for part in (before["content"], message["content"]) if part)
        messages[-1] = {**before, **message}
    else:
        messages.append(message)


def parse_text(content: Any, role: str) -> str:
    """Content as text: strings, numbers, lists of text parts; what tools return may be any JSON value."""
    if isinstance(content, str):
        return content
    if content is None:
        raise RowError(f"{_article(role)} message without content")
    if isinstance(content, bool | int | float):
        return json.dumps(content)
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") for p in content):
        if any(part["type"] != "text" for part in content):
            raise RowError("images, video or sound: only text is supported")
        return "".join(str(part.get("text", "")) for part in content)
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    raise RowError(f"{_article(role)} message whose content is not text")


def parse_json(value: Any, what: str) -> Any:
    """The value itself, or what its JSON text says (CSV cells, quoted columns)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(
            f"{what} that are not JSON" if what.endswith("s") else f"{what} that is not JSON"
        ) from error


def _split_pair(item: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs = [(_ROLES.get(key.lower()), content) for key, content in item.items()]
    spoken = [(role, content) for role, content in pairs if role in ("system", "user", "assistant")]
    if not spoken:
        raise RowError("a message without role")
    return spoken


def _add_calls(messages: list[Message], calls: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Calls belong to the assistant's message before them; several in a row are made at once."""
    weights = {key: item[key] for key in _WEIGHT_KEYS if item.get(key) is not None}
    _check_weights(weights)
    if messages and messages[-1]["role"] == "assistant":
        before = messages[-1]
        if any(before.get(key) != value for key, value in weights.items()):
            raise RowError("a tool call with another loss than the message that it belongs to")
        messages[-1] = {**before, "tool_calls": [*before.get("tool_calls", ()), *calls]}
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": calls, **weights})


def _parse_calls(value: Any) -> list[dict[str, Any]]:
    """OpenAI's form: {"type": "function", "function": {"name": str, "arguments": object}}, ids kept."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("a tool call without name")
        arguments = parse_json(function.get("arguments", {}), "a tool call's arguments")
        named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        identity = {"id": call["id"]} if call.get("id") else {}
        calls.append({**identity, "type": "function", "function": named})
    return calls


def _joins(before: Message, message: Message) -> bool:
    if (
        before["role"] != message["role"]
        or message["role"] not in ("user", "assistant")
        or "tool_calls" in before
    ):
        return False
    return all(before.get(key) == message.get(key) for key in _WEIGHT_KEYS)


def _check_weights(message: Message) -> None:
    for key in _WEIGHT_KEYS:
        if key in message and not isinstance(message[key], bool | int | float):
            raise RowError(f'a "{key}" that is not a number')


def _article(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


def check_tools(value: Any) -> list[Any] | None:
    """A column of tools as a list in OpenAI's form; none where it is empty."""
    value = parse_json(value, "tools") if value else None
    if not value:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools that are not a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
