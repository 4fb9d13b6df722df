"""--print_config: complete, readable again, without a look at any file. Config files as a first argument."""

import json
from pathlib import Path

import pytest
import yaml

from swift.cli.commands import COMMANDS, Command
from swift.cli.flags import knobs_of
from swift.cli.main import run
from swift.utils import env


def print_config(argv: list[str], capsys: pytest.CaptureFixture[str], program: str = "swift") -> str:
    code = run([*argv, "--print_config"], program=program)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.title)
def test_every_command_prints_all_its_flags(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = print_config([command.name], capsys, command.program)
    assert first.startswith(f"# {command.title}\n")
    assert list(yaml.safe_load(first) or {}) == list(knobs_of(command))
    saved = tmp_path / "config.yaml"
    saved.write_text(first, encoding="utf-8")
    assert print_config([command.name, str(saved)], capsys, command.program) == first


def test_awkward_values_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["rlhf", "--system", 'two\nlines: "quoted" # 你好', "--dataset", "a b.jsonl#5", "[z", "x: y"]
    argv += [
        "--columns",
        '{"问": "query"}',
        "--learning_rate",
        "5e-7",
        "--device",
        "cuda:1",
        "--num_beams",
        "2",
    ]
    argv += ["--response_prefix", "", "--save_strategy", "no", "--max_steps", "-1", "--lora_alpha", "1.5"]
    argv += [
        "--deepspeed",
        '{"zero": 3}',
        "--reward_weights",
        "1",
        "0.5",
        "--model",
        "none",
        "--teacher_kl_coef=-0.1",
    ]
    first = print_config(argv, capsys)
    values = yaml.safe_load(first)
    assert values["system"] == 'two\nlines: "quoted" # 你好'
    assert values["dataset"] == ["a b.jsonl#5", "[z", "x: y"]
    assert (values["columns"], values["learning_rate"], values["model"]) == ({"问": "query"}, 5e-7, None)
    assert (values["save_strategy"], values["max_steps"], values["lora_alpha"]) == ("no", -1, 1.5)
    assert (values["deepspeed"], values["reward_weights"], values["teacher_kl_coef"]) == (
        '{"zero": 3}',
        [1, 0.5],
        -0.1,
    )
    saved = tmp_path / "config.yml"
    saved.write_text(first, encoding="utf-8")
    assert print_config(["rlhf", str(saved)], capsys) == first


def test_groups_and_defaults_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = print_config(["pt", "--hub_revision", "v1"], capsys)
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        "# swift pt",
        "# model",
        "# data",
        "# template",
        "# plugins",
        "# tuner",
        "# quant",
        "# optim",
        "# schedule",
        "# parallel",
        "# output",
        "# publish",
        "# task",
        "# sft",
        "# not yet in this version",
    ]
    assert "loss_scale: all\n" in text and text.endswith("hub_revision: v1\n")
    assert "merge_lora: true\n" in print_config(["merge_lora"], capsys)
    assert "train_type: full\n" in print_config(["sft"], capsys, "megatron")


def test_no_file_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing")
    text = print_config(["sft", "--model", missing, "--dataset", missing, "--columns", missing], capsys)
    assert yaml.safe_load(text)["columns"] == missing
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = print_config(["deploy", "--hub_token", "sesame-1", "--api_key", "sesame-2"], capsys)
    assert "sesame" not in text
    assert "api_key: null  # never printed\n" in text


def test_flags_win_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "sft.yaml"
    saved.write_text(
        "learning-rate: 1e-5\ndataset: [a.jsonl, b.jsonl]\nsave_strategy: no\ncolumns: {q: query}\n"
        "model: null\nreport_to: none\ntuner_type: full\nseed: null\n"
    )
    code = run(["sft", str(saved), "--lr", "2e-5", "--print_config"])
    captured = capsys.readouterr()
    values = yaml.safe_load(captured.out)
    assert code == 0
    assert (values["learning_rate"], values["dataset"]) == (2e-5, ["a.jsonl", "b.jsonl"])
    assert (values["save_strategy"], values["columns"], values["model"]) == ("no", {"q": "query"}, None)
    assert (values["report_to"], values["train_type"], values["seed"]) == (["none"], "full", 42)
    assert captured.err.splitlines() == [
        f"note: tuner_type in {saved} is --train_type here",
        "note: --lr is --learning_rate here",
    ]


def test_json_file_and_args_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "args.json"
    saved.write_text(json.dumps({"swift_version": "0.1.0", "command": "sft", "lora_rank": 4, "strict": True}))
    values = yaml.safe_load(print_config(["sft", str(saved)], capsys))
    assert (values["lora_rank"], values["strict"]) == (4, True)


def test_env_block_sets_what_is_not_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")  # so that it is restored afterwards
    monkeypatch.delenv("MASTER_PORT")
    saved = tmp_path / "c.yaml"
    saved.write_text("ENV:\n  MASTER_ADDR: 10.0.0.2\n  MASTER_PORT: 29501\nlora_rank: 2\n")
    assert "lora_rank: 2\n" in print_config(["sft", str(saved)], capsys)
    assert (env.read("MASTER_ADDR"), env.read("MASTER_PORT")) == ("10.0.0.1", "29501")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "c.yaml",
            "lerning_rate: 1\nto_hf: true\n",
            "unknown flag lerning_rate in {path}; did you mean",
        ),
        (
            "c.yaml",
            "lerning_rate: 1\nto_hf: true\n",
            "error: to_hf in {path} belongs to swift export",
        ),
        ("c.yaml", "max_length: [1, 2]\n", "max_length in {path} takes one value, got 2: 1 2"),
        ("c.yaml", "max_length: long\n", "max_length in {path} expects a whole number, got 'long'"),
        ("c.yaml", "a: [\n", "{path} is not YAML: "),
        ("c.yaml", "- a\n", "{path} must hold `flag: value` lines, got a list"),
        ("c.json", "{", "{path} is not JSON: "),
        ("c.yaml", "ENV: [a]\n", "ENV in {path} must hold `NAME: value` lines"),
    ],
)
def test_mistakes_in_a_file(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert run(["sft", str(path), "--print_config"]) == 2
    assert message.format(path=path) in capsys.readouterr().err


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: cannot read nowhere.yaml: No such file or directory\n"


def test_second_file_is_not_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert run(["sft", str(tmp_path / "a.yaml"), "b.yaml"]) == 2
    assert "unexpected argument 'b.yaml'" in capsys.readouterr().err
