"""`--streaming true` as a user runs it: the same training as without, killed and resumed as well."""

import pytest
from test_sft import losses, only_run, read_log, sft_command, write_rows

from swift.cli.main import run as run_command

STREAM = ("--streaming", "true", "--save_steps", "3")


def test_a_stream_trains_as_the_rows_themselves_do(tiny_llama_dir, tmp_path):
    """Over the ends of two passes, and with a row that cannot be used."""
    data = write_rows(tmp_path / "rows.jsonl", 22)
    data.write_text(data.read_text() + '{"nothing": 1}\n')
    curves = []
    for name, flags in (("rows", ()), ("stream", STREAM)):
        command = [
            *sft_command(tiny_llama_dir, data, tmp_path / name, *flags),
            "--train_dataloader_shuffle", "false", "--max_steps", "14",
        ]  # fmt: skip
        assert run_command(command) == 0
        curves.append(losses(only_run(tmp_path / name)))
    assert len(curves[0]) == 14 and curves[0] == curves[1]
    log = read_log(only_run(tmp_path / "stream"))
    assert [row["epoch"] for row in log[:14] if "loss" in row][4:6] == [0.0, 1.0]
    assert (log[0]["rows_read"], log[0]["rows_dropped"]) == (23, 1)
    assert (
        log[-1]["train_dataset"]
        == "69 rows read, 3 dropped; 3 no column with a conversation (columns: nothing)"
    )


@pytest.mark.parametrize("packing", [(), ("--packing", "true", "--max_length", "128")])
def test_a_stream_killed_and_resumed_is_the_unbroken_one(tiny_llama_dir, tmp_path, packing):
    data = write_rows(tmp_path / "rows.jsonl", 60)
    flags = (*STREAM, "--shuffle_buffer_size", "20", "--max_steps", "24", *packing)
    flags = (*flags, "--per_device_train_batch_size", "2") if packing else flags
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "whole", *flags)) == 0
    run = only_run(tmp_path / "whole")
    whole = losses(run)
    assert run_command(["sft", "--resume_from_checkpoint", str(run / "checkpoint-9")]) == 0
    assert losses(run) == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--streaming true needs --max_steps"),
        (("--max_steps", "3", "--save_strategy", "epoch"), "--save_strategy epoch: with --streaming true"),
        (("--max_steps", "3", "--logging_strategy", "epoch"), "--logging_strategy epoch: with --streaming"),
        (("--max_steps", "3", "--dataloader_drop_last", "true"), "go with --dataloader_drop_last yet"),
        (
            ("--max_steps", "3", "--split_dataset_ratio", "0.1"),
            "--split_dataset_ratio needs all rows at hand",
        ),
        (
            ("--max_steps", "3", "--cached_dataset", "x"),
            "--cached_dataset holds rows that are encoded already",
        ),
        (
            ("--max_steps", "3", "--max_length", "9"),
            "none of the 22 first training rows can be used: 22 longer",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tiny_llama_dir, tmp_path, capsys, flags, message):
    data = write_rows(tmp_path / "rows.jsonl", 22)
    command = sft_command(tiny_llama_dir, data, tmp_path / "out", "--streaming", "true", *flags)
    assert run_command(command) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
