"""What shells and word processors do to a command is repaired or explained."""

import pytest

from swift.cli.main import run
from swift.cli.shell import BLANK_ARGUMENT, repair_arguments
from swift.config.option import ConfigError


@pytest.mark.parametrize("blank", [" ", "   ", "\t", "\u00a0", "\u3000 ", "\r"])
def test_blank_arguments_are_dropped(blank: str) -> None:
    words, warnings = repair_arguments(["export", blank, "--to_hf", "true", blank])
    assert words == ["export", "--to_hf", "true"]
    assert warnings == [BLANK_ARGUMENT]


def test_blanks_before_a_flag_are_dropped() -> None:
    assert repair_arguments(["export", "   --to_hf=true"]) == (["export", "--to_hf=true"], [BLANK_ARGUMENT])


def test_values_with_blanks_stay() -> None:
    words = ["sft", "--system", "", "--response_prefix", "\n", "--model_name", " a ", "--max_steps", "-1"]
    assert repair_arguments(words) == (words, [])


def test_warning_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", " ", "--print_config"]) == 0
    assert capsys.readouterr().err == f"warning: {BLANK_ARGUMENT}\n"
    assert "# comment" in BLANK_ARGUMENT


@pytest.mark.parametrize(
    ("word", "name", "code", "flag"),
    [
        ("–save", "en dash", "U+2013", "--save"),
        ("—save_steps=5", "em dash", "U+2014", "--save_steps=5"),
        ("-–lora-rank", "en dash", "U+2013", "--lora-rank"),
        ("−−lr", "minus sign", "U+2212", "--lr"),
    ],
)
def test_other_dashes_are_named(
    word: str, name: str, code: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sft", word, "x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {word!r} does not begin with two hyphens but with another dash ({name}, {code})",
        f"hint: type {flag}",
    ]


def test_dashes_inside_values_are_fine() -> None:
    words = ["sft", "--system", "– one\n– two", "--model_name", "a–b", "--x", "—"]
    assert repair_arguments(words) == (words, [])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["“You", "are", "kind.”"], "You are kind."),
        (["”Qwen/Qwen3-8B”"], "Qwen/Qwen3-8B"),
        (["‘a’"], "a"),
    ],
)
def test_typographic_quotes_are_named(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        repair_arguments(["sft", "--system", *words, "--max_steps", "1"])
    assert "typographic quotes" in caught.value.message
    assert f"type plain quotes: '{text}'" in (caught.value.hint or "")


def test_quotes_of_a_text_are_fine() -> None:
    words = ["sft", "--system", "“你好”怎么说", "--model_name", "it’s", "「小黄」"]
    assert repair_arguments(words) == (words, [])


def test_windows_line_ends_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "--max_length", "2048\r"]) == 2
    assert "Windows line ends" in capsys.readouterr().err
