"""Every mistake in the input is one line that names flag, file or row; exit code 2; nothing stays behind."""

import json
from pathlib import Path

import pytest

from swift.cli.main import run as run_command

GOOD = {"query": "Who are you?", "response": "A robot."}
LONG = {"query": "word " * 300, "response": "yes"}
PREFERENCE = {"prompt": "q", "chosen": "a", "rejected": "b"}
NO_ANSWER = {"messages": [{"role": "user", "content": "hello"}]}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def train(tiny_llama_dir, tmp_path, capfd):
    """Runs `swift sft` on a file with the given text; returns exit code and what was said."""

    def run(text: str | None, *flags: str, model: Path | str = tiny_llama_dir) -> tuple[int, str]:
        data = tmp_path / "rows.jsonl"
        if text is not None:
            data.write_text(text)
        before = {p.name for p in tmp_path.iterdir()}
        command = [
            "sft",
            "--model",
            str(model),
            "--dataset",
            str(data),
            "--output_dir",
            str(tmp_path / "out"),
        ]
        code = run_command([*command, "--max_steps", "1", "--save_strategy", "no", *flags])
        if code:
            assert {p.name for p in tmp_path.iterdir()} == before, "something was left behind"
        return code, capfd.readouterr().err

    return run


BAD_DATA = {
    "missing file": (None, (), ["rows.jsonl: no such file"]),
    "empty file": ("", (), ["rows.jsonl: no rows in it"]),
    "broken line": (lines(GOOD) + '{"query": "x", "resp\n', (), ["rows.jsonl:2", "not valid JSON"]),
    "not an object": (lines(GOOD) + "[1]\n", (), ["rows.jsonl:2", "not a JSON object"]),
    "no assistant turn": (lines(GOOD, NO_ANSWER), (), ["rows.jsonl:2", "no assistant turn"]),
    "all too long": (lines(LONG, LONG), ("--max_length", "64"), ["longer than", "rows.jsonl:1"]),
    "many too long": (
        lines(*[GOOD] * 3, LONG),
        ("--max_length", "64"),
        ["longer than --max_length 64", "rows.jsonl:4"],
    ),
    "preference rows": (lines(PREFERENCE), (), ["preference data", "--rlhf_type dpo", "rows.jsonl:1"]),
    "unknown columns": (lines({"foo": 1}), (), ["no column with a conversation", "rows.jsonl:1"]),
    "strict": (lines(*[GOOD] * 9, PREFERENCE), ("--strict", "true"), ["rows.jsonl:10", "preference data"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(train, name):
    text, flags, expected = BAD_DATA[name]
    code, said = train(text, *flags)
    assert code == 2 and "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    for words in expected:
        assert words in said.replace(" line ", ":"), said


def test_few_dropped_rows_are_counted_and_training_goes_on(train):
    code, said = train(lines(*[GOOD] * 9, LONG), "--max_length", "64")
    assert code == 0
    assert "1 of 10 training rows dropped: longer than --max_length 64" in said and "rows.jsonl:10" in said


def test_more_may_be_dropped_when_allowed(train):
    code, said = train(lines(GOOD, LONG), "--max_length", "64", "--max_drop_ratio", "0.5")
    assert code == 0 and "1 of 2 training rows dropped" in said
    code, said = train(lines(GOOD, NO_ANSWER), "--allow_unsupervised", "true", "--max_drop_ratio", "0.5")
    assert code == 0 and "1 of 2 training rows dropped: no assistant turn" in said


def test_a_model_directory_without_weights(train, tiny_llama_dir, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((tiny_llama_dir / "config.json").read_bytes())
    code, said = train(lines(GOOD), model=broken)
    assert code == 2 and f"--model {broken} has no weights" in said


def test_a_model_that_does_not_exist(train):
    code, said = train(lines(GOOD), model="./nowhere")
    assert code == 2 and "--model ./nowhere: no such directory" in said


def test_an_output_directory_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").touch()
    code, said = train(lines(GOOD), "--output_dir", str(tmp_path / "file" / "out"))
    assert code == 2 and "--output_dir" in said and "is a file" in said


def test_self_cognition_without_a_name(train):
    code, said = train(None, "--dataset", "swift/self-cognition")
    assert code == 2 and "--model_name is missing" in said


def test_flags_that_contradict_each_other(train):
    code, said = train(lines(GOOD), "--val_dataset", "x.jsonl", "--split_dataset_ratio", "0.1")
    assert code == 2 and "--val_dataset and --split_dataset_ratio" in said
