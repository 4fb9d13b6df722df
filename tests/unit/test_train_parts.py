"""The small parts around the loop: cadence, run directories, time, logs, plots."""

import json

import pytest

from swift.config.option import ConfigError
from swift.engines.protocol import Sums
from swift.train.loop import Cadence
from swift.train.rundir import check_writable, new_run_directory
from swift.train.state import format_seconds, loss_and_metrics
from swift.train.trackers import cut_log, plot_log, smooth, tagged
from swift.utils.files import append_jsonl, read_jsonl


@pytest.mark.parametrize(
    ("strategy", "every", "expected"),
    [("steps", 4, [4, 8, 10]), ("steps", 0.25, [3, 6, 9, 10]), ("epoch", 4, [5, 10]), ("no", 4, [])],
)
def test_cadence(strategy, every, expected):
    cadence = Cadence.of(strategy, every, steps_per_epoch=5, total_steps=10)
    assert [s for s in range(1, 11) if cadence.due(s)] == expected


def test_run_directories_count_upwards(tmp_path):
    names = [new_run_directory(tmp_path, True).name.split("-")[0] for _ in range(3)]
    assert names == ["v0", "v1", "v2"]
    assert new_run_directory(tmp_path / "plain", False) == tmp_path / "plain"


def test_an_output_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output_dir .* is a file"):
        check_writable(tmp_path / "file" / "out")
    check_writable(tmp_path / "new" / "deep")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(6.4, "6s"), (8721, "2h 25m 21s"), (104663, "1d 5h 4m 23s"), (60, "1m 0s")]
)
def test_time_as_users_read_it(seconds, text):
    assert format_seconds(seconds) == text


def test_means_come_from_sums():
    sums = Sums()
    sums.add("loss/tokens", 6.0, 3)
    sums.add("loss/tokens", 2.0, 1)
    sums.add("loss/pairs", 1.0, 2)
    sums.add("token_acc", 1, 4)
    sums.add("never", 0, 0)
    assert loss_and_metrics(sums) == {"loss": 2.5, "token_acc": 0.25}


def row(step: int, **values) -> dict:
    return {**values, "global_step/max_steps": f"{step}/9"}


def test_a_log_is_cut_back_to_a_step(tmp_path):
    log = tmp_path / "logging.jsonl"
    kept = [row(1, loss=1.0), row(2, loss=2.0), row(2, eval_loss=3.0)]
    append_jsonl(log, [*kept, row(3, loss=4.0), {"summary": 1}])
    with log.open("a") as handle:
        handle.write('{"loss": 5')  # torn by a kill
    cut_log(log, 2)
    assert read_jsonl(log) == kept


def test_every_number_gets_a_tag_and_a_picture(tmp_path):
    rows = [row(i, loss=1 / i, learning_rate=0.1, elapsed_time="1s") for i in range(1, 6)]
    append_jsonl(tmp_path / "logging.jsonl", [*rows, row(5, eval_loss=0.5)])
    assert tagged(rows[0]) == {"train/loss": 1.0, "train/learning_rate": 0.1}
    plot_log(tmp_path / "logging.jsonl", tmp_path / "images")
    names = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert names == ["eval_loss.png", "train_learning_rate.png", "train_loss.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "images").iterdir())


def test_smoothing_has_no_start_up_bias():
    assert smooth((2.0, 2.0, 2.0), 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert json.dumps(smooth((1.0, 0.0), 0.5)) == json.dumps([1.0, 1 / 3])
