"""`swift infer` as a process: a session through pipes, the way scripts drive it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

RULE = "-" * 50


def start(programs: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [programs / "swift", "infer", "--device", "cpu", "--temperature", "0", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def talk(programs: Path, text: str, *flags: str) -> tuple[str, str]:
    process = start(programs, *flags)
    output, notices = process.communicate(text, timeout=180)
    assert process.returncode == 0, notices
    return output, notices


def test_a_piped_session_answers_and_ends_with_its_input(programs, tmp_path, make_tiny_model_dir) -> None:
    model: Path = make_tiny_model_dir(tmp_path, tie_word_embeddings=False)
    path = tmp_path / "turns.jsonl"
    lines = "Who are you?\nmulti-line\n你是\n谁？#\nclear\nsingle-line\nBye"
    flags = ("--model", str(model), "--max_new_tokens", "6", "--result_path", str(path))
    output, notices = talk(programs, lines, *flags)
    assert output.count(RULE) == 3
    assert output.startswith("<<< ")
    assert output.endswith(f"{RULE}\n<<< \n")
    assert output.count("<<<[M] ") == 3
    assert "Input `exit` or `quit` to exit the conversation." in notices
    assert "Traceback" not in notices
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [2, 4, 2]
    assert rows[1]["messages"][2]["content"] == "你是\n谁？"
    shown = [part.split("<<< ")[-1].split("<<<[M] ")[-1] for part in output.split(f"\n{RULE}\n")]
    assert shown[:3] == [row["response"].removesuffix("\n") for row in rows]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_stops_an_answer_and_then_the_session(programs, tmp_path, make_tiny_model_dir) -> None:
    """The model's context is far longer than anyone waits for; stop tokens of a random model are rare."""
    path: Path = make_tiny_model_dir(tmp_path, max_position_embeddings=1_000_000)
    process = start(programs, "--model", str(path))
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("Who are you?\n")
    process.stdin.flush()
    shown = process.stdout.read(40)  # the prompt and the beginning of the answer
    assert shown.startswith("<<< ")
    process.send_signal(signal.SIGINT)
    while not shown.endswith(f"{RULE}\n<<< "):
        piece = process.stdout.read(1)
        assert piece, process.stderr.read()
        shown += piece
    assert process.poll() is None
    time.sleep(0.2)  # now it waits for input
    process.send_signal(signal.SIGINT)
    _, notices = process.communicate(timeout=60)
    assert process.returncode == 0, notices
    assert "answer stopped" in notices
    assert "Traceback" not in notices
