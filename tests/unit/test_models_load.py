"""Loading any model directory: dtype, attention, pad token, and directories that cannot be loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift.config.option import ConfigError
from swift.models import load
from swift.models.load import (
    choose_attention,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
)

CPU = torch.device("cpu")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_any_directory_loads_without_a_model_type(family: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(f"tiny_{family}_dir")
    model = load_model(path, dtype=None, attention=None, device=CPU)
    assert model.config.model_type == family
    assert model.dtype == torch.float32 and not model.training
    assert sum(p.numel() for p in model.parameters()) == sum(
        t.numel() for t in load_file(path / "model.safetensors").values()
    )
    assert context_length(model) == context_length(load_config(path)) == 512


def test_dtype_is_float32_on_a_cpu_unless_named(tmp_path: Path, make_tiny_model_dir, monkeypatch) -> None:
    path = make_tiny_model_dir(tmp_path)
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    edit_json(path / "config.json", dtype="bfloat16")
    assert load_model(path, dtype=None, attention=None, device=CPU).dtype == torch.float32
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert load_model(path, dtype="bfloat16", attention=None, device=CPU).dtype == torch.bfloat16


def test_attention_names(tiny_llama_dir: Path, monkeypatch, capfd) -> None:
    assert (
        load_model(tiny_llama_dir, dtype=None, attention="eager", device=CPU).config._attn_implementation
        == "eager"
    )
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: False)
    assert choose_attention("flash_attn") == "sdpa"
    assert capfd.readouterr().err.count("flash_attention_2 is not installed") == 1
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_attention("flash_attn") == choose_attention("flash_attention_2") == "flash_attention_2"
    assert choose_attention(None) is None
    assert choose_attention("one_of_the_engine") == "one_of_the_engine"
    with pytest.raises(ConfigError, match="one_of_the_engine"):  # handed on; transformers does not know it
        load_model(tiny_llama_dir, dtype=None, attention="one_of_the_engine", device=CPU)


def test_a_pad_token_is_never_the_end_token_when_there_is_another(
    tmp_path: Path, make_tiny_model_dir
) -> None:
    path = make_tiny_model_dir(tmp_path)
    assert load_tokenizer(path).pad_token == "<|endoftext|>"
    config = path / "tokenizer_config.json"
    text = json.loads(config.read_text())
    del text["pad_token"]
    config.write_text(json.dumps(text))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("<|endoftext|>", 0, 2)
    edit_json(config, eos_token="<|endoftext|>")  # the only token with such a name ends turns itself
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    del text["eos_token"]
    config.write_text(json.dumps(text))
    assert load_tokenizer(path).pad_token == "<|endoftext|>"


def test_weights_that_are_missing_or_do_not_fit_are_not_made_up(tmp_path: Path, make_tiny_model_dir) -> None:
    path = make_tiny_model_dir(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 tensors, the first is model.layers.1.mlp.up_proj.weight"):
        load_model(path, dtype=None, attention=None, device=CPU)
    (path / "model.safetensors").write_bytes(whole[:5000])
    with pytest.raises(ConfigError, match=f"the model in {path} cannot be loaded: .*header"):
        load_model(path, dtype=None, attention=None, device=CPU)
    (path / "model.safetensors").write_bytes(whole)
    edit_json(path / "config.json", vocab_size=100)
    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight is \[\d+, 64\], not \[100, 64\]"):
        load_model(path, dtype=None, attention=None, device=CPU)
    edit_json(path / "config.json", model_type="made_up")
    with pytest.raises(ConfigError, match="model type `made_up`"):
        load_model(path, dtype=None, attention=None, device=CPU)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        load_model(path, dtype=None, attention=None, device=CPU)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path, tiny_llama_dir: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(tiny_llama_dir, path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=f"the tokenizer in {path} cannot be loaded"):
        load_tokenizer(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"m has no tokenizer \(tokenizer.json"):
        load_tokenizer(path)


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match="--device gpu is not a device"):
        pick_device("gpu")
    with pytest.raises(ConfigError, match=r"--device cuda:99: torch sees \d+ GPUs here"):
        pick_device("cuda:99")


def test_a_cpu_without_half_precision_rounds_weights_and_computes_in_float32(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    rounded = load_model(tiny_llama_dir, dtype="bfloat16", attention=None, device=CPU)
    exact = load_model(tiny_llama_dir, dtype="float32", attention=None, device=CPU)
    assert rounded.dtype == torch.float32
    for ours, theirs in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16).float())
