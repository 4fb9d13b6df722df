"""Models to a hub and back, through the hubs' own libraries: the hub is tests/hub_server.py."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer

import hub_server
from hub_server import LARGE, READ_TOKEN, TOKEN, Hub, Repository
from swift.cli.main import run as run_command
from swift.config.option import ConfigError, build
from swift.config.runs import ExportRun
from swift.config.tuner import TunerConfig
from swift.data.sources import open_rows
from swift.export.run import run_export
from swift.models.adapters import add_lora
from swift.models.hub import resolve_adapter, resolve_model
from swift.models.load import load_model
from swift.utils.files import file_sha256

pytest.importorskip("modelscope_hub")
CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("use_hf", [True, False], ids=["huggingface", "modelscope"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, which ids of both kinds mean; empty caches; nobody is logged in."""
    found = Hub()
    stop = found.start()
    for name in ("USE_HF", "SWIFT_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MODELSCOPE_CACHE", "MODELSCOPE_HOME", "HF_HOME", "SWIFT_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", found.address)
    # The library has read its variables already.
    settings = {
        "HF_HUB_OFFLINE": False, "ENDPOINT": found.address, "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": found.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "HF_HOME" / "hub"), "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.chdir(tmp_path)
    yield found
    stop()


def export(**flags: object) -> int:
    return run_export(build(ExportRun, {"push_to_hub": True, "hub_token": TOKEN, **flags}))


def hashes(path: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in path.iterdir()}


@BOTH
def test_a_model_goes_to_the_hub_and_comes_back_equal(use_hf, hub, tiny_llama_dir, tmp_path, capfd) -> None:
    name = "ann/tiny"
    flags = {"model": str(tiny_llama_dir), "hub_model_id": name, "use_hf": use_hf, "commit_message": "first"}
    assert export(**flags, hub_private_repo=True) == 0
    pushed = hub.repositories[name]
    assert pushed.private and pushed.messages[0].startswith("first")
    fetched = resolve_model(name, use_hf=use_hf, token=READ_TOKEN)
    assert hashes(fetched) == hashes(tiny_llama_dir) and "model.safetensors" in hashes(fetched)
    asked = len(hub.asked)
    assert resolve_model(name, use_hf=use_hf) == fetched  # out of the cache
    assert len(hub.asked) == asked
    # Again: nothing large goes over the wire, and the repository is not made anew.
    assert export(**flags) == 0
    assert pushed is hub.repositories[name] and pushed.private
    assert sum(line.startswith("PUT") for line in hub.asked) == 1
    said = capfd.readouterr()
    assert f"pushed {tiny_llama_dir} to {hub.address}" in said.err
    assert TOKEN not in said.err + said.out and READ_TOKEN not in said.err + said.out
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size < LARGE]
    assert len(written) > 5 and not any(TOKEN.encode() in file.read_bytes() for file in written)


def test_the_command_line_asks_the_hub_of_its_environment(hub, workers, tiny_llama_dir, tmp_path) -> None:
    flags = f"--model {tiny_llama_dir} --push_to_hub true --hub_model_id tiny --hub_token {TOKEN}"
    environment = {
        "HF_ENDPOINT": hub.address, "USE_HF": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    hook = f"{Path(hub_server.__file__)}:read_environment"
    done = workers.run(["export", *flags.split()], hook=hook, environment=environment)
    assert done.code == 0, done.stderr
    assert f"to {hub.address}/ann/tiny" in done.stderr and TOKEN not in done.stdout + done.stderr
    assert set(hub.repositories["ann/tiny"].files) == set(hashes(tiny_llama_dir))
    assert hub.repositories["ann/tiny"].messages == ["update files"]


@BOTH
def test_a_download_that_breaks_goes_on_where_it_was(use_hf, hub, tiny_llama_dir, monkeypatch) -> None:
    content = {file.name: file.read_bytes() for file in tiny_llama_dir.iterdir()}
    hub.repositories["ann/tiny"] = Repository(files=content)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut_after = 30_000
    if not use_hf:  # this library also goes on with what another process left
        hub.refuses_later = True
        with pytest.raises(ConfigError, match="--model ann/tiny could not be fetched from ModelScope"):
            resolve_model("ann/tiny")
        hub.refuses = False
    fetched = resolve_model("ann/tiny", use_hf=use_hf)
    assert hashes(fetched) == hashes(tiny_llama_dir)
    weights = [line for line in hub.asked if line.startswith("GET") and "model.safetensors" in line]
    assert "bytes=" not in weights[0] and weights[-1].endswith(" bytes=30000-")


@BOTH
def test_only_one_format_of_the_weights_is_fetched(use_hf, hub, tiny_llama_dir) -> None:
    content = {file.name: file.read_bytes() for file in tiny_llama_dir.iterdir()}
    others = {"pytorch_model.bin": b"x", "model.gguf": b"x", "onnx/model.safetensors": b"x"}
    hub.repositories["ann/tiny"] = Repository(files=content | others)
    assert set(hashes(resolve_model("ann/tiny", use_hf=use_hf))) == set(content)


@BOTH
def test_adapters_go_without_what_only_their_run_needs(use_hf, hub, tiny_llama_dir, tmp_path) -> None:
    """Neither optimizer nor secrets go with them; the system prompt of the training does."""
    checkpoint = tmp_path / "run" / "checkpoint-3"
    model = load_model(tiny_llama_dir, dtype=None, attention=None, device=CPU)
    add_lora(model, TunerConfig(lora_rank=4), seed=1).save_pretrained(checkpoint)
    for file in tiny_llama_dir.glob("*t*ken*.json"):
        shutil.copy(file, checkpoint)
    args = {"model": str(tiny_llama_dir), "system": 'Say "hi".', "hub_token": "hidden"}
    (checkpoint / "args.json").write_text(json.dumps(args))
    for name in ("trainer_state.json", "optimizer.bin", "rng_state.pth"):
        (checkpoint / name).write_text("{}")
    before = hashes(checkpoint)
    assert export(adapters=(str(checkpoint),), hub_model_id="ann/lora", use_hf=use_hf) == 0
    assert hashes(checkpoint) == before
    fetched = resolve_adapter("ann/lora", use_hf=use_hf)
    expected = {"adapter_config.json", "adapter_model.safetensors", "args.json", "tokenizer.json"}
    assert expected <= set(hashes(fetched)) and not set(hashes(fetched)) & {
        "trainer_state.json",
        "optimizer.bin",
    }
    assert hashes(fetched)["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert "hidden" not in (fetched / "args.json").read_text()
    chat = [{"role": "user", "content": "q"}]
    text = AutoTokenizer.from_pretrained(fetched).apply_chat_template(chat, tokenize=False)
    assert text.startswith('<|im_start|>system\nSay "hi".<|im_end|>\n<|im_start|>user\nq')


def train(model: Path, output: Path, **flags: object) -> int:
    data = output.with_suffix(".jsonl")
    data.write_text(json.dumps({"query": "q", "response": "a"}) + "\n")
    chosen = {
        "model": model, "dataset": data, "output_dir": output, "add_version": "false", "max_steps": 3,
        "save_steps": 1, "lora_rank": 2, "report_to": "none", "device": "cpu", "system": "Be brief.",
        "push_to_hub": "true", "hub_model_id": "run", "hub_token": TOKEN, **flags,
    }  # fmt: skip
    return run_command(
        ["sft", *(str(word) for name, value in chosen.items() for word in (f"--{name}", value))]
    )


@BOTH
def test_checkpoints_go_to_the_hub_while_training_goes_on(
    use_hf, hub, tiny_llama_dir, tmp_path, capfd
) -> None:
    """The first upload fails, which the training survives; every other one follows, the last one stays."""
    hub.refused_commits = 1
    flags = {"use_hf": use_hf, "hub_always_push": "true", "hub_private_repo": "true"}
    assert train(tiny_llama_dir, tmp_path / "run", **flags) == 0
    said = capfd.readouterr().err
    assert "warning: checkpoint-1 was not uploaded: --hub_model_id ann/run" in said
    pushed = hub.repositories["ann/run"]
    assert pushed.private and [m.split()[0] for m in pushed.messages] == ["checkpoint-2", "checkpoint-3"]
    last = hashes(tmp_path / "run" / "checkpoint-3")
    fetched = hashes(resolve_adapter("ann/run", use_hf=use_hf, token=READ_TOKEN))
    assert fetched["adapter_model.safetensors"] == last["adapter_model.safetensors"]
    assert b"Be brief." in pushed.files["chat_template.jinja"]
    assert not [name for name in pushed.files if name.startswith(("optimizer", "scheduler", "trainer_state"))]
    assert not any(TOKEN.encode() in content for content in pushed.files.values()) and TOKEN not in said


def test_what_fails_is_tried_again_at_the_end(hub, tiny_llama_dir, tmp_path, capfd) -> None:
    flags = {"use_hf": "true", "hub_strategy": "end"}
    assert train(tiny_llama_dir, tmp_path / "run", **flags) == 0
    assert hub.repositories["ann/run"].messages == ["checkpoint-3"]
    capfd.readouterr()
    hub.refused_commits = 99
    assert train(tiny_llama_dir, tmp_path / "again", use_hf="true") == 0
    said = capfd.readouterr().err
    tries = [line for line in said.splitlines() if " was not uploaded: " in line]
    assert len(tries) >= 2 and "checkpoint-3" in tries[-1]
    assert "warning: checkpoint-3 is not on HuggingFace; again: swift export --push_to_hub true" in said
    assert train(tiny_llama_dir, tmp_path / "none", hub_token="wrong", use_hf="true") == 2
    assert "--hub_model_id run: HuggingFace does not know this token" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


@BOTH
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hub_token": "wrong"}, "{flag}: {hub} does not know this token"),
        ({"hub_token": None}, "{flag}: {hub} wants a token"),
        ({"hub_token": READ_TOKEN}, "{flag}: {hub} does not allow it to this token"),
        ({"hub_model_id": "a/b/c"}, "--hub_model_id a/b/c has not the form OWNER/NAME"),
    ],
)
def test_what_the_hub_does_not_take(flags, message, use_hf, hub, tiny_llama_dir) -> None:
    with pytest.raises(ConfigError) as caught:
        export(**{"model": str(tiny_llama_dir), "hub_model_id": "ann/tiny", "use_hf": use_hf, **flags})
    name = "HuggingFace" if use_hf else "ModelScope"
    assert caught.value.message == message.format(flag="--hub_model_id ann/tiny", hub=name)
    assert hub.repositories == {}


@BOTH
def test_what_the_hub_does_not_have(use_hf, hub, monkeypatch) -> None:
    name = "HuggingFace" if use_hf else "ModelScope"
    with pytest.raises(ConfigError, match=f"--model ann/none does not exist on {name}"):
        resolve_model("ann/none", use_hf=use_hf)
    hub.repositories["ann/empty"] = Repository(files={"README.md": b"nothing"})
    with pytest.raises(ConfigError, match=r"--model \S+ has no config.json|could not be fetched"):
        resolve_model("ann/empty", use_hf=use_hf)
    silent = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", silent)
    with pytest.raises(ConfigError, match=f"could not be fetched from {name}"):
        resolve_model("ann/none", use_hf=use_hf)
    with pytest.raises(ConfigError, match=f"could not be pushed to {name}: {silent} does not answer"):
        export(model="ann/none", hub_model_id="ann/tiny", use_hf=use_hf)


def test_a_revision_that_is_not_there_and_a_gate(hub: Hub, monkeypatch) -> None:
    monkeypatch.setenv("USE_HF", "1")
    hub.repositories["ann/tiny"] = Repository(files={"config.json": b"{}"})
    with pytest.raises(ConfigError, match="--model ann/tiny has no revision v9 on HuggingFace"):
        resolve_model("ann/tiny", revision="v9")
    hub.repositories["ann/tiny"].gated = True
    with pytest.raises(ConfigError, match="--model ann/tiny is gated on HuggingFace"):
        resolve_model("ann/tiny")


@BOTH
def test_nothing_is_asked_about_what_is_here_or_when_offline(
    use_hf, hub, tiny_llama_dir, monkeypatch
) -> None:
    assert resolve_model(str(tiny_llama_dir), use_hf=use_hf) == tiny_llama_dir
    monkeypatch.setenv("SWIFT_OFFLINE", "1")
    with pytest.raises(ConfigError, match="neither a directory nor in the cache, and SWIFT_OFFLINE is on"):
        resolve_model("ann/tiny", use_hf=use_hf)
    with pytest.raises(ConfigError, match=r"--push_to_hub needs \w+, and SWIFT_OFFLINE is on"):
        export(model=str(tiny_llama_dir), hub_model_id="ann/tiny", use_hf=use_hf)
    assert hub.asked == []


def test_rows_come_from_modelscope(hub: Hub, monkeypatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{"query": "q", "response": "a"}, {"query": "你", "response": "b"}]
    files = {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(), "README.md": b"rows"}
    hub.repositories["ann/rows"] = Repository(files=files)
    options = {"seed": 1, "shuffle": False, "columns": {}}
    found = open_rows(("ann/rows",), **options)
    assert [row.columns for row in found] == rows
    with pytest.raises(ConfigError, match="dataset ann/none: not found as a file or on ModelScope"):
        open_rows(("ann/none",), **options)
