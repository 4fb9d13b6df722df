"""Mistakes are told in words, exit code 2, before the code of a command is imported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift.cli import main
from swift.cli.commands import COMMANDS
from swift.cli.commands import load as load_import_string
from swift.cli.main import run
from swift.config.option import ConfigError

RUNNABLE = ["sft", "--model", "m", "--dataset", "d.jsonl"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configs that reached a run function; none of those is imported."""
    reached: list[Any] = []

    def finish(config: Any) -> int:
        reached.append(config)
        return 7

    def load(path: str) -> Any:
        return finish if path in {command.run for command in COMMANDS} else load_import_string(path)

    monkeypatch.setattr(main, "load", load)
    for name in ("NPROC_PER_NODE", "NNODES", "SWIFT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return reached


def errors(argv: list[str], capsys: pytest.CaptureFixture[str], program: str = "swift") -> list[str]:
    """What stderr says of a mistake."""
    assert run(argv, program=program) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_good_command_runs(calls: list[Any]) -> None:
    assert run([*RUNNABLE, "--learning-rate", "1e-3", "--packing", "false", "--deepspeed", "none"]) == 7
    assert calls[0].optim.learning_rate == 1e-3
    assert calls[0].data.dataset == ("d.jsonl",)
    assert run(["merge_lora", "--adapters", "a"]) == 7
    assert calls[1].export.merge_lora is True


def test_all_unknown_flags_in_one_go(capsys: pytest.CaptureFixture[str], calls: list[Any]) -> None:
    argv = [*RUNNABLE, "--lerning_rate", "1", "--to_mcore", "--lora-r", "8", "--zzzz=1", "--epochs", "x"]
    assert errors(argv, capsys) == [
        "error: unknown flag --lerning_rate; did you mean --learning_rate?",
        "error: --to_mcore belongs to swift export",
        "error: unknown flag --lora-r; did you mean --lora_rank?",
        "error: unknown flag --zzzz; see swift sft --help",
        "error: unknown flag --epochs; did you mean --num_train_epochs?",
    ]
    assert calls == []


def test_flag_of_the_other_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors(["sft", "--micro_batch_size", "1"], capsys) == [
        "error: --micro_batch_size belongs to megatron pt, megatron sft, megatron rlhf (and 1 more)"
    ]
    assert errors(["sft", "--num_generations", "8"], capsys) == [
        "error: --num_generations belongs to swift rlhf"
    ]


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors(["exprot"], capsys) == [
        "error: swift has no command 'exprot'",
        "hint: did you mean `swift export`?",
    ]
    assert errors(["infer"], capsys, "megatron")[0] == "error: megatron has no command 'infer'"


def test_all_wrong_values_in_one_go(capsys: pytest.CaptureFixture[str], calls: list[Any]) -> None:
    argv = [*RUNNABLE, "--max_length", "long", "--lora_dropout", "2", "--strict", "perhaps", "--optim"]
    assert errors(argv, capsys) == [
        "error: --max_length expects a whole number, got 'long'",
        "error: --lora_dropout must be from 0 to 1, got 2.0",
        "error: --strict expects true or false, got 'perhaps'",
        "error: --optim needs a value: a text",
    ]
    assert errors([*RUNNABLE, "--system", "You", "are"], capsys) == [
        "error: --system takes one value, got 2: You are (put quotes around a value with blanks)"
    ]
    assert calls == []


def test_later_flags_stop_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], calls: list[Any]
) -> None:
    assert errors([*RUNNABLE, "--cached_val_dataset", "rows"], capsys) == [
        "error: --cached_val_dataset is not yet supported in this version; remove it"
    ]
    argv = ["infer", "--rope_scaling", "linear", "--data_parallel_size", "2"]
    assert errors(argv, capsys) == [
        "note: --data_parallel_size is --vllm_data_parallel_size here",
        "error: --rope_scaling, --vllm_data_parallel_size are not yet supported in this version; remove them",
    ]
    assert calls == []


@pytest.mark.parametrize(
    "words",
    [
        ["--streaming", "false"],
        ["--push_to_hub", "false"],
        ["--packing_strategy", "binpack"],
        ["--use_chat_template", "true"],
        ["--sequence_parallel_size", "1"],
    ],
)
def test_later_flag_that_is_off_does_not_stop(words: list[str], calls: list[Any]) -> None:
    assert run([*RUNNABLE, *words]) == 7


def test_switching_off_what_is_on_by_default_does_stop(
    capsys: pytest.CaptureFixture[str], calls: list[Any]
) -> None:
    command = [*RUNNABLE, "--add_non_thinking_prefix", "false"]
    assert "--add_non_thinking_prefix is not yet" in errors(command, capsys)[0]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.run], ids=lambda c: c.title)
def test_commands_to_come(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert errors([command.name], capsys, command.program) == [
        f"error: {command.title}: not yet in this version",
        "hint: --print_config shows what it would be given",
    ]


def test_contradictions_are_found_before_the_run(
    capsys: pytest.CaptureFixture[str], calls: list[Any]
) -> None:
    assert errors(["sft", "--dataset", "d"], capsys)[0] == "error: --model is missing"
    assert errors(["export", "--adapters", "a"], capsys)[0] == "error: nothing to export"
    assert calls == []


def test_several_processes(
    capsys: pytest.CaptureFixture[str], calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, list[str]]] = []

    def launch(module: str, argv: list[str]) -> int:
        started.append((module, argv))
        return 5

    monkeypatch.setattr("swift.engines.launch.launch", launch)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    assert run(RUNNABLE) == 7 and started == []
    for name, value in (("NNODES", "2"), ("NODE_RANK", "1"), ("MASTER_ADDR", "192.0.2.1")):
        monkeypatch.setenv(name, value)
    assert run(RUNNABLE) == 5 and started == [("swift", RUNNABLE)] and len(calls) == 1
    monkeypatch.setenv("LOCAL_RANK", "0")  # already one of the processes
    assert run(RUNNABLE) == 7 and len(started) == 1
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("NNODES", "two")
    assert errors(RUNNABLE, capsys)[0] == "error: NNODES=two is not a number of processes"
    assert run(["merge-lora", "--adapters", "a"]) == 7
    assert run([*RUNNABLE, "--print_config"]) == 0


def test_json_file_as_a_value_is_read_when_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: list[Any]
) -> None:
    columns = tmp_path / "columns.json"
    columns.write_text('{"q": "query"}')
    assert run([*RUNNABLE, "--columns", str(columns)]) == 7
    assert calls[0].data.columns == {"q": "query"}
    assert errors([*RUNNABLE, "--columns", "nothing.json"], capsys) == [
        "error: --columns expects JSON or a file, got 'nothing.json': No such file or directory"
    ]
    columns.write_text("[1]")
    assert "must hold an object, got a list" in errors([*RUNNABLE, "--columns", str(columns)], capsys)[0]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (ConfigError("no such file", hint="look again"), 2, "error: no such file\nhint: look again\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_run_raises(
    raised: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: Any) -> int:
        raise raised

    inner: Callable[[str], Any] = main.load
    monkeypatch.setattr(main, "load", lambda path: fail if path == "swift.train.run:run_sft" else inner(path))
    assert run(RUNNABLE) == code
    assert capsys.readouterr().err == said


def test_debug_shows_the_traceback(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_DEBUG", "1")
    with pytest.raises(ConfigError, match="unknown flag --nonsense"):
        run(["sft", "--nonsense", "1"])


def test_other_exceptions_keep_their_traceback(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(RUNNABLE)


def test_flags_are_not_positional(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors(["sft", "model"], capsys)[0] == "error: unexpected argument 'model'"
    assert errors(["sft", "-model", "m"], capsys) == [
        "error: '-model' is not a flag",
        "hint: flags begin with two hyphens: --model",
    ]
