"""Checkpoints are whole or refused; what is kept and what is linked."""

import errno
import json
import shutil
import threading
from pathlib import Path

import pytest

from swift.config.option import ConfigError
from swift.engines.protocol import Snapshot, Sums
from swift.engines.ranks import Ranks
from swift.models.directory import list_checkpoints
from swift.train.saving import (
    STATE,
    Saver,
    find_checkpoint,
    is_better,
    remove_partial,
)
from swift.train.state import TrainState
from swift.utils.files import MANIFEST, find_damage, write_manifest


class FileEngine:
    """Stands where an engine stands: writes two files, as real engines write theirs."""

    def save(self, path: Path, *, resumable: bool) -> Snapshot:
        contents = {"adapter_model.safetensors": b"weights" * 100}
        contents |= {"optimizer.safetensors": b"moments" * 100} if resumable else {}

        def write() -> list[Path]:
            for name, content in contents.items():
                (path / name).write_bytes(content)
            return [path / name for name in contents]

        return Snapshot(sum(map(len, contents.values())), write)


def make_saver(directory: Path, tokenizer, **options) -> Saver:
    defaults = {"only_model": False, "total_limit": None, "symlinks": True, "ranks": Ranks()}
    return Saver(directory, tokenizer, {"model": "m"}, {"rows": 3}, **(defaults | options))


def save_steps(saver: Saver, metrics: dict[int, float | None]) -> TrainState:
    state = TrainState()
    for step, metric in metrics.items():
        state.step = step
        saver.save(FileEngine(), state, metric, lower_is_better=True)
    saver.wait()
    return state


def test_a_saved_checkpoint_is_whole_and_found(tmp_path, tiny_tokenizer):
    save_steps(make_saver(tmp_path, tiny_tokenizer), {5: None, 10: None})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5, 10]
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path / "checkpoint-5") == tmp_path / "checkpoint-5"
    assert (tmp_path / "last").resolve() == tmp_path / "checkpoint-10"
    assert not list(tmp_path.glob(".*"))


def test_the_limit_keeps_best_and_last(tmp_path, tiny_tokenizer):
    saver = make_saver(tmp_path, tiny_tokenizer, total_limit=2)
    state = save_steps(saver, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4]
    assert (tmp_path / "best").resolve().name == "checkpoint-2"
    assert (state.best_metric, state.best_step, state.last_saved_step) == (1.0, 2, 4)


def test_saving_a_step_again_replaces_it(tmp_path, tiny_tokenizer):
    saver = make_saver(tmp_path, tiny_tokenizer)
    save_steps(saver, {2: None})
    (tmp_path / "checkpoint-2" / "stale").touch()
    save_steps(saver, {2: None})
    assert not (tmp_path / "checkpoint-2" / "stale").exists()
    assert find_damage(tmp_path / "checkpoint-2") is None


def checkpoint_files(directory: Path) -> list[str]:
    return [str(p.relative_to(directory)) for p in sorted(directory.rglob("*")) if p.is_file()]


def test_every_truncated_file_is_named_and_the_one_before_is_offered(tmp_path, tiny_tokenizer, capsys):
    save_steps(make_saver(tmp_path, tiny_tokenizer), {1: None, 2: None})
    checkpoint = tmp_path / "checkpoint-2"
    for name in checkpoint_files(checkpoint):
        path = checkpoint / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ConfigError, match="is damaged") as caught:
            find_checkpoint(checkpoint)
        assert name in caught.value.message
        assert caught.value.hint == f"resume from {tmp_path / 'checkpoint-1'}"
        assert find_checkpoint(tmp_path).name == "checkpoint-1"
        assert (
            f"checkpoint-2 is damaged: {caught.value.message.split(': ')[-1]}; looking for the one before"
            in (capsys.readouterr().err)
        )
        path.write_bytes(whole)
    assert find_damage(checkpoint) is None


def test_same_size_but_other_contents_is_damage(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    (tmp_path / "a").write_bytes(b"12346")
    assert find_damage(tmp_path) == "the contents of a have changed"
    (tmp_path / "a").unlink()
    assert find_damage(tmp_path) == "a is missing"
    (tmp_path / MANIFEST).unlink()
    assert find_damage(tmp_path) == f"it has no {MANIFEST}"


def test_a_checkpoint_without_optimizer_cannot_be_resumed(tmp_path, tiny_tokenizer):
    save_steps(make_saver(tmp_path, tiny_tokenizer, only_model=True), {1: None})
    with pytest.raises(ConfigError, match="no optimizer state"):
        find_checkpoint(tmp_path / "checkpoint-1")


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        find_checkpoint(tmp_path / "missing")


def test_half_written_checkpoints_are_removed(tmp_path):
    (tmp_path / ".checkpoint-7.tmp").mkdir()
    assert remove_partial(tmp_path) == [".checkpoint-7.tmp"]
    assert not list(tmp_path.iterdir())


class SlowEngine(FileEngine):
    """Its files are written when the test says so, and not at all where it says `error`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_write, self.error = threading.Event(), error

    def save(self, path: Path, *, resumable: bool) -> Snapshot:
        snapshot = super().save(path, resumable=resumable)

        def write() -> list[Path]:
            assert self.may_write.wait(60)
            files = snapshot.write()
            if self.error:
                raise self.error
            return files

        return Snapshot(snapshot.bytes, write)


def start_saving(saver: Saver, engine: FileEngine, step: int) -> TrainState:
    state = TrainState(step=step)
    saver.save(engine, state, None, lower_is_better=True)
    return state


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, tiny_tokenizer):
    """A checkpoint holds the state at its own step, and has no name before it is whole."""
    saver, engine = make_saver(tmp_path, tiny_tokenizer), SlowEngine()
    state = start_saving(saver, engine, 3)
    assert not list_checkpoints(tmp_path) and not saver.take_whole()
    state.step = 4
    engine.may_write.set()
    saver.wait()
    assert saver.take_whole() == [tmp_path / "checkpoint-3"] and not saver.take_whole()
    assert json.loads((tmp_path / "checkpoint-3" / STATE).read_text())["state"]["step"] == 3


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "?"), ValueError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_names_what_stays(tmp_path, tiny_tokenizer, error):
    saver, engine = make_saver(tmp_path, tiny_tokenizer), SlowEngine(error)
    save_steps(saver, {3: None})
    start_saving(saver, engine, 6)
    engine.may_write.set()
    with pytest.raises(ConfigError) as caught:
        saver.wait()
    assert caught.value.message.startswith(
        f"checkpoint-6 cannot be written to {tmp_path}: No space left on device ("
    )
    assert caught.value.message.endswith(
        ".checkpoint-6.tmp was removed; the last whole one is checkpoint-3; training was stopped"
    )
    assert caught.value.hint == f"make room, then go on with --resume_from_checkpoint {tmp_path}"
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-3"]


def test_other_errors_of_the_writer_are_shown_as_they_are(tmp_path, tiny_tokenizer):
    saver, engine = make_saver(tmp_path, tiny_tokenizer), SlowEngine(ValueError("ours"))
    start_saving(saver, engine, 6)
    engine.may_write.set()
    with pytest.raises(RuntimeError, match="checkpoint-6 could not be written") as caught:
        start_saving(saver, engine, 9)
    assert str(caught.value.__cause__) == "ours" and not list(tmp_path.glob("*checkpoint*"))


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path, tiny_tokenizer, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError) as caught:
        start_saving(make_saver(tmp_path, tiny_tokenizer), FileEngine(), 2)
    assert "checkpoint-2 cannot be written" in caught.value.message
    assert "it needs 1.37 KiB, and 1000 bytes are free; there is no whole one" in caught.value.message
    assert not list(tmp_path.iterdir())


def test_links_and_the_limit_are_put_right_when_a_run_goes_on(tmp_path, tiny_tokenizer):
    """As after a kill between the last checkpoint's name and everything that follows it."""
    save_steps(make_saver(tmp_path, tiny_tokenizer), {1: 1.0, 2: 2.0, 3: 3.0})
    (tmp_path / "last").unlink()
    make_saver(tmp_path, tiny_tokenizer, total_limit=2).tidy(1, 3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3]
    assert (tmp_path / "last").resolve().name == "checkpoint-3"


def test_direction_of_the_best_metric():
    assert is_better(1.0, None, True) and is_better(1.0, 2.0, True) and not is_better(2.0, 2.0, True)
    assert is_better(3.0, 2.0, False) and not is_better(1.0, 2.0, False)


def test_state_survives_json(tmp_path):
    state = TrainState(step=3, tokens=17, elapsed_seconds=1.5, best_metric=0.1 + 0.2, best_step=2)
    state.window.add("loss/tokens", 1 / 3, 7)
    assert TrainState.from_dict(state.to_dict()) == state
    assert state.window == Sums({"loss/tokens": (1 / 3, 7.0)})
