"""`swift infer` over a dataset on several processes, killed in the middle, and in few bits."""

import json
import os
import signal
from pathlib import Path

import pytest

from swift.infer import batch

FLAGS = ("--device", "cpu", "--temperature", "1.1", "--max_new_tokens", "6", "--write_batch_size", "4")


def kill_at(rank: int, write: int) -> None:
    """SIGKILL at the write-th time that rows would be written, of the process that writes."""
    append, count = batch.append_jsonl, 0

    def append_or_die(path: Path, rows: list) -> None:
        nonlocal count
        count += 1
        if count == write:
            with path.open("a") as handle:
                handle.write('{"response": "half a ro')
                handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, rows)

    batch.append_jsonl = append_or_die
    del rank


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Two files of questions, one row too long for the context."""
    paths = []
    for name, count in (("a", 9), ("b", 6)):
        rows = [{"query": f"{name} {i}" + " more" * (3 * i % 7), "tag": i} for i in range(count)]
        rows[3]["query"] += " long" * (600 if name == "a" else 1)
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    return paths


@pytest.mark.slow
def test_two_processes_killed_and_continued_give_the_rows_of_one(workers, tiny_llama_dir, files, tmp_path):
    def infer(name: str, processes: int, *flags: str, **options):
        result = tmp_path / f"{name}.jsonl"
        command = ["infer", "--model", str(tiny_llama_dir), "--val_dataset", *files, *FLAGS, *flags]
        return result, workers.run([*command, "--result_path", str(result)], processes, **options)

    single, done = infer("single", 1, "--max_batch_size", "3")
    assert done.code == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in single.read_text().splitlines()]
    asked = [tuple(row["messages"][0]["content"].split()[:2]) for row in rows]
    assert asked == [("a", str(i)) for i in range(9) if i != 3] + [("b", str(i)) for i in range(6)]
    assert [row["tag"] for row in rows[:4]] == [0, 1, 2, 4]
    assert "1 row not answered, longer than the context of 512 tokens" in done.stderr
    assert "answered 4 of 15 rows" in done.stderr
    assert "left" in done.stderr

    hook = {"hook": f"{__file__}:kill_at", "hook_arguments": {"write": 3}}
    result, killed = infer("killed", 2, **hook)
    assert killed.code == -signal.SIGKILL
    assert result.read_text().count("\n") == 7  # two windows, less the row that is too long
    result, done = infer("killed", 2, "--max_batch_size", "2")
    assert done.code == 0, done.stderr[-3000:]
    assert "the unfinished last line was removed" in done.stderr
    assert "has answers to 7 of 15 rows: they are left out" in done.stderr
    assert result.read_bytes() == single.read_bytes()
    figures = json.loads(next(line for line in done.stderr.splitlines() if line.startswith("{")))
    assert figures["num_samples"] == 7

    result, done = infer("killed", 1)
    assert done.code == 0
    assert "has answers to 14 of 15 rows" in done.stderr
    assert result.read_bytes() == single.read_bytes()


def test_a_chat_takes_one_process(workers, tiny_llama_dir, tmp_path):
    done = workers.run(
        ["infer", "--model", str(tiny_llama_dir), "--device", "cpu"], environment={"WORLD_SIZE": "2"}
    )
    assert done.code == 2
    assert "error: a chat takes one process, not 2" in done.stderr


@pytest.mark.slow
def test_weights_in_few_bits_answer(workers, tiny_llama_dir, tmp_path, files):
    pytest.importorskip("bitsandbytes")
    result = tmp_path / "few.jsonl"
    done = workers.run([
        "infer", "--model", str(tiny_llama_dir), "--val_dataset", files[1], *FLAGS, "--quant_method", "bnb",
        "--quant_bits", "4", "--result_path", str(result),
    ])  # fmt: skip
    assert done.code == 0, done.stderr[-3000:]
    assert len(result.read_text().splitlines()) == 6
