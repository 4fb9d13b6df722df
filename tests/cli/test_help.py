"""--help and --version say what there is, without importing anything heavy."""

import subprocess
import sys

import pytest

from swift import __version__
from swift.cli.commands import COMMANDS, Command
from swift.cli.flags import knobs_of
from swift.cli.main import run

HEAVY = {"torch", "numpy", "transformers", "datasets", "peft", "rich", "yaml", "matplotlib", "pydantic"}
CHILD = (
    "import sys; from swift.cli.main import run; code = run(sys.argv[2:], program=sys.argv[1]);"
    "print(code, *sys.modules, file=sys.stderr)"
)


def show(argv: list[str], capsys: pytest.CaptureFixture[str], program: str = "swift") -> str:
    assert run(argv, program=program) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "heavy"),
    [
        (["swift", "--help"], 0, set()),
        (["swift", "sft", "--help"], 0, set()),
        (["megatron", "sft", "--help"], 0, set()),
        (["swift", "sft", "--model", "m", "--lerning_rate", "1"], 2, set()),
        (["swift", "sft", "--model", "m", "--dataset", "d", "--push_to_hub", "true"], 2, set()),
        (["swift", "sft", "--model", "m"], 2, set()),
        (["swift", "sft", "--model", "m", "--print_config"], 0, {"yaml"}),
    ],
)
def test_nothing_heavy_is_imported(argv: list[str], code: int, heavy: set[str]) -> None:
    child = subprocess.run([sys.executable, "-c", CHILD, *argv], capture_output=True, text=True, check=True)
    found_code, *modules = child.stderr.splitlines()[-1].split()
    assert int(found_code) == code
    assert HEAVY & set(modules) == heavy
    assert "swift.cli.flags" in modules


def test_console_script_starts() -> None:
    command = [sys.executable, "-m", "swift", "sft", "--nonsense"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == "error: unknown flag --nonsense; see swift sft --help\n"


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m swift sft --help | true"
    child = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert child.stderr == ""


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_program_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = show(argv, capsys)
    for command in COMMANDS:
        if command.program == "swift":
            assert f"\n  {command.name}" in text and command.help in text
    assert "megatron" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(["--version"], capsys) == f"{__version__}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.title)
def test_command_help_shows_every_flag_with_its_default(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    text = show([command.name, "--help"], capsys, command.program)
    groups = {knob.group for knob in knobs_of(command).values()}
    for group in groups - {""}:
        assert f"\n\n{group}: " in text
    for name in knobs_of(command):
        assert f"\n  --{name} " in text
    assert text.count("default ") >= len(knobs_of(command))
    assert max(map(len, text.splitlines())) <= 110
    assert ("Not yet in this version" in text) == (command.run is None)


def test_help_has_units_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(show(["sft", "--help"], capsys).split())
    assert "--max_length N longest row; none = the model's context [tokens, default none]" in text
    assert "train adapters or all weights; one of lora, full [default lora]" in text
    assert "--adam_epsilon X AdamW epsilon [default 1e-08]" in text
    later = text.split("not yet in this version: ")[1].split()
    assert {"vit_*", "packing_strategy", "swanlab_*", "temperature"} <= set(later)
    assert {"learning_rate", "rlhf_type", "use_galore"} & set(later) == set()
