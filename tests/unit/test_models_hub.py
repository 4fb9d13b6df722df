"""`--model` and `--adapters` to directories: the order of places, and every mistake in words. No network."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from swift.config.option import ConfigError
from swift.models import hub
from swift.models.builtin import SMOLLM2
from swift.models.hub import resolve_adapter, resolve_model


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, no switch set, and a test that reaches for a hub fails."""
    for name in ("USE_HF", "SWIFT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "swift"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: None)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked a hub")

    monkeypatch.setattr(hub, "HfApi", refuse)
    monkeypatch.setattr(hub, "snapshot_download", refuse)


def fake_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x")
    return path


def fake_adapter(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"x")
    return path


def test_a_directory_comes_before_everything(tmp_path: Path, tiny_llama_dir: Path) -> None:
    assert resolve_model(str(tiny_llama_dir), use_hf=True) == tiny_llama_dir
    local = fake_model(tmp_path / "Qwen" / "Qwen3-0.6B")
    assert resolve_model("Qwen/Qwen3-0.6B", use_hf=True) == local
    assert resolve_model("Qwen/../Qwen/Qwen3-0.6B/") == local
    own = fake_model(tmp_path / "smollm2-135m")
    assert resolve_model("smollm2-135m") == own


def test_a_pickled_model_is_whole_and_a_link_is_followed(tmp_path: Path) -> None:
    path = fake_model(tmp_path / "old")
    (path / "model.safetensors").rename(path / "pytorch_model-00001-of-00001.bin")
    (tmp_path / "last").symlink_to(path)
    assert resolve_model("./last") == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "--model ./nope: no such directory"),
        ("/no/such/place", "--model /no/such/place: no such directory"),
        ("~/no-such-place", "--model ~/no-such-place: no such directory"),
        ("output/v0/checkpoint-9", "--model output/v0/checkpoint-9: no such directory"),
        ("a b", "--model a b: neither a directory nor a hub id such as Qwen/Qwen3-0.6B"),
        ("Qwen3-8B", "--model Qwen3-8B: no such directory, and hub ids have the form org/name"),
        ("", "--model is empty"),
    ],
)
def test_names_that_are_no_model(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name)
    assert caught.value.message == message


def test_two_part_names_under_a_local_directory_are_paths(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    with pytest.raises(ConfigError, match="--model output/checkpoint-9: no such directory") as caught:
        resolve_model("output/checkpoint-9")
    assert caught.value.hint == "output is a directory here, so this is not read as a hub id"


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"--model model.gguf is a file"):
        resolve_model("model.gguf")


def test_a_directory_that_lacks_something_says_what(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    with pytest.raises(ConfigError, match=f"^--model {path} has no config.json$"):
        resolve_model(str(path))
    (path / "config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"x")  # not the model's own weights
    with pytest.raises(ConfigError, match=r"has no weights \(\*\.safetensors or pytorch_model\*\.bin\)"):
        resolve_model(str(path))
    shards = {f"t{i}": f"model-{i}-of-3.safetensors" for i in (1, 2, 3)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (path / "model-2-of-3.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has no model-1-of-3.safetensors \(2 of 3 weight files"):
        resolve_model(str(path))
    (path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"index.json is not valid JSON"):
        resolve_model(str(path))


def test_adapters_and_run_directories_get_a_hint(tmp_path: Path) -> None:
    adapter = fake_adapter(tmp_path / "run" / "checkpoint-9")
    with pytest.raises(ConfigError) as caught:
        resolve_model(str(adapter))
    assert caught.value.hint == f"it holds adapters: pass --adapters {adapter}"
    newest = fake_adapter(tmp_path / "run" / "checkpoint-10")
    with pytest.raises(ConfigError, match=r"--adapters .*run has no adapter_config.json") as caught:
        resolve_adapter(str(tmp_path / "run"))
    assert caught.value.hint == f"a checkpoint inside it: {newest}"
    model = fake_model(tmp_path / "whole")
    with pytest.raises(ConfigError) as caught:
        resolve_adapter(str(model))
    assert caught.value.hint == f"it holds a whole model: pass --model {model}"
    (newest / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_model.safetensors"):
        resolve_adapter(str(newest))
    assert resolve_adapter(str(adapter)) == adapter
    with pytest.raises(ConfigError, match=r"--adapters ./nope: no such directory"):
        resolve_adapter("./nope")


def test_the_built_in_name_in_any_case(tmp_path: Path) -> None:
    cached = fake_model(SMOLLM2.cache)
    assert resolve_model("SmolLM2-135M") == resolve_model("smollm2-135m", use_hf=True) == cached


def test_the_published_id_falls_back_to_the_built_in_copy_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cached = fake_model(SMOLLM2.cache)
    assert resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct") == cached
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "using smollm2-135m, the built-in 4-bit" in said

    class Unreachable:
        def __init__(self, token: str | None) -> None: ...

        def model_info(self, *_: object, **__: object) -> None:
            raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "HfApi", Unreachable)
    assert resolve_model("huggingfacetb/smollm2-135m-instruct", use_hf=True) == cached
    assert "Name or service not known; using smollm2-135m" in capfd.readouterr().err


def test_the_published_id_in_the_hub_cache_is_used_silently(tmp_path, monkeypatch, capfd) -> None:
    snapshot = fake_model(tmp_path / "hf" / "snapshots" / "abc")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: str(snapshot / "config.json"))
    assert resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct") == snapshot
    assert capfd.readouterr().err == ""


def test_caches_of_both_hubs_are_used_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fake_model(tmp_path / "ms" / "hub" / "Qwen" / "Qwen2___5-0___5B")
    assert resolve_model("Qwen/Qwen2.5-0.5B") == old
    default = fake_model(tmp_path / "ms" / "models" / "Qwen--Qwen2.5-0.5B" / "snapshots" / "master")
    tagged = fake_model(tmp_path / "ms" / "models" / "Qwen--Qwen2.5-0.5B" / "snapshots" / "v1")
    assert resolve_model("Qwen/Qwen2.5-0.5B") == default
    assert resolve_model("Qwen/Qwen2.5-0.5B", revision="v1") == tagged
    snapshot = fake_model(tmp_path / "hf")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: str(snapshot / "config.json"))
    assert resolve_model("Qwen/Qwen2.5-0.5B") == default
    assert resolve_model("Qwen/Qwen2.5-0.5B", use_hf=True) == snapshot
    (snapshot / "model.safetensors").unlink()  # only the config was ever fetched
    assert resolve_model("Qwen/Qwen2.5-0.5B", use_hf=True) == default
    shutil.rmtree(tmp_path / "ms")
    adapter = fake_adapter(tmp_path / "ms" / "models" / "me" / "lora")
    assert resolve_adapter("me/lora") == adapter


def test_offline_switches_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigError, match="is neither a directory nor in the cache, and HF_HUB_OFFLINE is on"
    ):
        resolve_model("Qwen/Qwen3-0.6B", use_hf=True)
    monkeypatch.setenv("SWIFT_OFFLINE", "1")
    with pytest.raises(ConfigError, match="SWIFT_OFFLINE is on"):
        resolve_model("Qwen/Qwen3-0.6B")


def test_modelscope_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'modelscope'", name="modelscope")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"ModelScope's library is not installed \(modelscope\)") as caught:
        resolve_model("Qwen/Qwen3-0.6B")
    assert caught.value.hint == "pip install 'swiftune[hub]', or pass --use_hf true for HuggingFace"
