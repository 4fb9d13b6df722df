"""`swift sft --packing true` as a user runs it, on a tiny model."""

import pytest
from safetensors.torch import load_file
from test_sft import losses, only_run, read_log, sft_command, write_rows

from swift.cli.main import run as run_command
from swift.config.option import ConfigError
from swift.train.resume import Resumption, check_same_data
from swift.train.state import TrainState

FLAGS = (
    "--packing", "true", "--max_length", "128", "--per_device_train_batch_size", "2",
    "--num_train_epochs", "3", "--save_steps", "2",
)  # fmt: skip


def test_a_packed_run_learns_and_goes_on_to_the_bit(tiny_llama_dir, tmp_path, capsys):
    """Stopped in the second epoch, so that the packs of an epoch have to be found again."""
    data = write_rows(tmp_path / "rows.jsonl", 60)
    command = sft_command(tiny_llama_dir, data, tmp_path / "out", *FLAGS)
    assert run_command(command) == 0
    run = only_run(tmp_path / "out")
    told = " ".join("".join(capsys.readouterr()).split())
    curve = losses(run)
    num_packs = int(told.split("packing: ")[1].split()[0])
    steps = 3 * -(-num_packs // 2)
    assert f"packing: {num_packs} packs of up to 128 tokens" in told and 60 / num_packs > 2
    assert f"{-(-num_packs // 2)} steps an epoch, {steps} in all" in told
    assert [row[0] for row in curve] == [f"{i + 1}/{steps}" for i in range(steps)]
    assert curve[-1][1] < curve[0][1] - 0.5
    summary = read_log(run)[-1]
    seconds = summary["train_runtime"]
    assert summary["train_samples_per_second"] * seconds == pytest.approx(180, rel=0.05)
    before = load_file(run / "last" / "adapter_model.safetensors")
    middle = next(s for s in range(2, steps, 2) if s > steps / 3)
    assert run_command(["sft", "--resume_from_checkpoint", str(run / f"checkpoint-{middle}")]) == 0
    assert losses(run) == curve
    after = load_file(run / "last" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)


def test_packed_and_unpacked_runs_learn_the_same(tiny_llama_dir, tmp_path):
    """All rows in one step, without dropout: the curve does not know about packs."""
    data = write_rows(tmp_path / "rows.jsonl")
    curves = []
    for name, flags in (
        ("packed", ("--packing", "true", "--packing_length", "100", "--attn_impl", "sdpa")),
        ("rows", ()),
    ):
        command = [
            *sft_command(tiny_llama_dir, data, tmp_path / name),
            "--gradient_accumulation_steps", "6", "--lora_dropout", "0", "--max_steps", "4",
            "--save_strategy", "no", *flags,
        ]  # fmt: skip
        assert run_command(command) == 0
        curves.append([loss for _, loss, _ in losses(only_run(tmp_path / name))])
    assert curves[0] == pytest.approx(curves[1], rel=2e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--packing_length", "64"), "--packing_length has no effect without --packing true"),
        (
            ("--packing", "true", "--packing_length", "64", "--max_length", "65"),
            "--packing_length 64 is below --max_length 65: a row has to fit into a pack",
        ),
        (("--packing", "true", "--packing_length", "0"), "--packing_length must be at least 1, got 0"),
        (
            ("--packing", "true", "--packing_length", "9"),
            "none of the 24 training rows can be used: 24 longer than",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_refused(tiny_llama_dir, tmp_path, capsys, flags, message):
    data = write_rows(tmp_path / "rows.jsonl")
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_rows_are_encoded_by_one_command_and_trained_by_another(tiny_llama_dir, tmp_path):
    """The same losses as from the rows themselves, on training and on evaluation rows."""
    data = write_rows(tmp_path / "rows.jsonl")
    split = ("--split_dataset_ratio", "0.2")
    target = tmp_path / "encoded"
    command = [
        "export",
        "--model",
        str(tiny_llama_dir),
        "--dataset",
        str(data),
        "--to_cached_dataset",
        "true",
    ]
    assert run_command([*command, *split, "--output_dir", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["train", "val"]
    flags = ("--max_steps", "4", "--save_steps", "4")
    stored = sft_command(tiny_llama_dir, data, tmp_path / "stored", *flags)
    place = stored.index("--dataset")
    stored[place : place + 2] = ["--cached_dataset", str(target)]
    assert run_command(stored) == 0
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "rows", *flags, *split)) == 0
    logs = [read_log(only_run(tmp_path / name)) for name in ("stored", "rows")]
    curves = [[row[key] for row in log for key in ("loss", "eval_loss") if key in row] for log in logs]
    assert len(curves[0]) == 5 and curves[0] == curves[1]


def test_resuming_refuses_other_packs(tiny_llama_dir, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl")
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *FLAGS)) == 0
    checkpoint = only_run(tmp_path / "out") / "checkpoint-2"
    assert run_command(["sft", "--resume_from_checkpoint", str(checkpoint), "--packing_length", "200"]) == 2
    assert "--packing_length 200 differs from the checkpoint's None" in capsys.readouterr().err
    state = Resumption(checkpoint, TrainState(), {"rows": 24, "packs": "fd1e"})
    with pytest.raises(ConfigError, match="packs was fd1e, now 0c9a"):
        check_same_data(state, {"rows": 24, "packs": "0c9a"})
