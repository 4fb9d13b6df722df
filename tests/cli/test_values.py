"""The syntax of values, and what is said about a wrong one."""

from typing import Any

import pytest

from swift.cli.values import parse_value, to_plain, to_words
from swift.config.option import ConfigError


@pytest.mark.parametrize(
    ("kind", "words", "value"),
    [
        ("bool", [], True),
        ("bool", ["true"], True),
        ("bool", ["True"], True),
        ("bool", ["1"], True),
        ("bool", ["yes"], True),
        ("bool", ["no"], False),
        ("bool", ["FALSE"], False),
        ("bool", ["none"], None),
        ("int", ["-1"], -1),
        ("int", ["1e3"], 1000),
        ("int", ["16.0"], 16),
        ("float", ["5e-7"], 5e-7),
        ("float", ["-.5"], -0.5),
        ("float", ["3"], 3.0),
        ("float", ["null"], None),
        ("str", [""], ""),
        ("str", ["a b"], "a b"),
        ("str", ["None"], None),
        ("str", ['{"a": 1}'], '{"a": 1}'),
        ("list", ["a", "b c"], ("a", "b c")),
        ("list", ['["a", "b c"]'], ("a", "b c")),
        ("list", ["[a"], ("[a",)),
        ("list", ["[]"], ()),
        ("list", ["none"], None),
        ("list[int]", ["8000", "8001"], (8000, 8001)),
        ("list[float]", ["[0.5, 1]"], (0.5, 1.0)),
        ("dict", ['{"old": "new", "n": [1, 2]}'], {"old": "new", "n": [1, 2]}),
        ("dict", ["columns.json"], "columns.json"),
        ("any", ["x", "y"], ("x", "y")),
    ],
)
def test_value(kind: str, words: list[str], value: Any) -> None:
    found = parse_value("--flag", kind, tuple(words))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("int", ["abc"], "--flag expects a whole number, got 'abc'"),
        ("int", ["1.5"], "--flag expects a whole number, got '1.5'"),
        ("int", [], "--flag needs a value: a whole number"),
        ("list[int]", [], "--flag needs a value: one whole number or several"),
        ("float", ["1,5"], "--flag expects a number, got '1,5'"),
        ("float", ["1", "2"], "--flag takes one value, got 2: 1 2"),
        ("bool", ["maybe"], "--flag expects true or false, got 'maybe'"),
        ("list[int]", ["1", "x"], "--flag expects a whole number, got 'x'"),
        ("dict", ["{a: 1}"], '--flag expects JSON such as {"key": "value"}, or a .json file, got \'{a: 1}\''),
    ],
)
def test_wrong_value(kind: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_value("--flag", kind, tuple(words))
    assert caught.value.message == message


def test_none_is_a_word_where_a_value_is_required() -> None:
    assert parse_value("--report_to", "list", ("none",), optional=False) == ("none",)
    with pytest.raises(ConfigError, match="expects a whole number, got 'none'"):
        parse_value("--seed", "int", ("none",), optional=False)


def test_typographic_quotes_in_json_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_value("--columns", "dict", ("{“a”: “b”}",))
    assert caught.value.hint == "these are typographic quotes; type plain ones"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("bool", False),
        ("int", -3),
        ("float", 1e-8),
        ("str", "two\nlines"),
        ("str", ""),
        ("list", ["[x]", "none"]),
        ("list", ['["a"]']),
        ("list", []),
        ("dict", {"a": {"b": [1, None, "ü"]}}),
        ("str", None),
    ],
)
def test_a_file_value_survives_as_words(kind: str, value: Any) -> None:
    assert to_plain(parse_value("--flag", kind, to_words(value))) == value


def test_whole_floats_are_printed_as_integers() -> None:
    assert repr(to_plain((3.0, 0.5, 1e20))) == "[3, 0.5, 1e+20]"
