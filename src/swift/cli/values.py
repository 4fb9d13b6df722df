"""Words of the command line become values.

Owns: the syntax of every kind of value (bool, int, float, str, dict, list, list[int], list[float], any), and
what is said when it is wrong. A value arrives as the words that stood after its flag; values of a file are
put into such words first, so there is one syntax.
"""

import json
import typing
from contextlib import suppress
from typing import Any

from swift.config.option import ConfigError, Knob

EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "dict": 'JSON such as {"key": "value"}, or a .json file',
    "any": "anything",
    "list": "one value or several",
    "list[int]": "one whole number or several",
    "list[float]": "one number or several",
}
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
NOTHING = ("none", "null")


def kind_of(knob: Knob) -> str:
    """The kind of a config field: `tuple[str, ...] | None` -> list."""
    base = knob.base_type
    origin = typing.get_origin(base) or base
    if origin is tuple:
        item = typing.get_args(base)[0].__name__
        return "list" if item == "str" else f"list[{item}]"
    kind: str = origin.__name__
    assert kind in EXPECTED, f"{knob.name}: no syntax for {knob.type}"
    return kind


def parse_value(name: str, kind: str, words: tuple[str, ...], *, optional: bool = True) -> Any:
    """The value that `words` give to the flag `name`; ConfigError names flag, words and syntax."""
    if kind == "bool" and not words:
        return True
    if kind == "any":
        return words
    if not words:
        raise ConfigError(f"{name} needs a value: {EXPECTED[kind]}")
    if kind.startswith("list"):
        return _parse_list(name, kind, words, optional)
    if len(words) > 1:
        raise ConfigError(
            f"{name} takes one value, got {len(words)}: {' '.join(words)}",
            hint="put quotes around a value with blanks",
        )
    if optional and words[0].lower() in NOTHING:
        return None
    return _parse_word(name, kind, words[0])


def _parse_list(name: str, kind: str, words: tuple[str, ...], optional: bool) -> tuple[Any, ...] | None:
    if len(words) == 1 and optional and words[0].lower() in NOTHING:
        return None
    if len(words) == 1 and words[0].startswith("["):
        with suppress(json.JSONDecodeError):  # else a plain value that begins with a bracket
            words = tuple(to_word(item) for item in json.loads(words[0]))
    item_kind = kind[5:-1] or "str"
    return tuple(_parse_word(name, item_kind, word) for word in words)


def _parse_word(name: str, kind: str, word: str) -> Any:
    try:
        return PARSERS[kind](word)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{name} expects {EXPECTED[kind]}, got {word!r}", hint=_explain(word, error)
        ) from None


def _parse_int(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        value = float(word)
        if not value.is_integer():
            raise
        return int(value)


def _parse_dict(word: str) -> dict[str, Any] | str:
    """A JSON object; any other text is kept: the path of a file, which is read when the command runs."""
    if not word.lstrip().startswith("{"):
        return word
    value: dict[str, Any] = json.loads(word)
    return value


PARSERS: dict[str, Any] = {
    "bool": lambda word: BOOLEANS[word.lower()],
    "int": _parse_int,
    "float": float,
    "str": str,
    "dict": _parse_dict,
}


def _explain(word: str, error: Exception) -> str | None:
    if any(character in word for character in "“”‘’"):
        return "these are typographic quotes; type plain ones"
    return str(error) if isinstance(error, json.JSONDecodeError) else None


def to_words(value: Any) -> tuple[str, ...]:
    """The words that give `value`, which stood in a YAML or JSON file."""
    if not isinstance(value, list):
        return (to_word(value),)
    words = tuple(to_word(item) for item in value)
    plain = len(words) > 1 or (words and not words[0].startswith("["))
    return words if plain else (json.dumps(value, ensure_ascii=False),)


def to_word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def to_plain(value: Any) -> Any:
    """The value as a YAML file holds it: whole floats as integers, so that 3 and 3.0 print alike."""
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
