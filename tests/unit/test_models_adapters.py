"""LoRA adapters: which modules get them, where they start, and adapters that belong to another model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift.config.option import ConfigError
from swift.config.tuner import TunerConfig
from swift.models.adapters import adapter_base, add_lora, load_adapter, load_run_args, merge
from swift.models.load import load_model

IDS = torch.arange(3, 40)[None]


def load(path: Path, dtype: str | None = None) -> torch.nn.Module:
    return load_model(path, dtype=dtype, attention=None, device=torch.device("cpu"))


def lora_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_lora(base: Path, path: Path) -> torch.Tensor:
    """Writes adapters that change something; returns the logits with them."""
    model = add_lora(load(base), TunerConfig(), seed=5).eval()
    torch.manual_seed(11)
    for name, weight in lora_weights(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path)
    with torch.inference_mode():
        return model(IDS).logits


def test_all_linear_leaves_out_the_output_layer_and_starts_as_the_base(tiny_llama_dir: Path) -> None:
    base = load(tiny_llama_dir)
    with torch.inference_mode():
        expected = base(IDS).logits
    model = add_lora(base, TunerConfig(lora_rank=4, lora_alpha=8), seed=1)
    names = lora_weights(model)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all("lora_" in name for name in names)
    # two layers; q and o 64x64, k and v 64x32, three of the MLP 64x128: rank * (in + out) each
    assert sum(p.numel() for p in names.values()) == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    with torch.inference_mode():
        assert torch.equal(model.eval()(IDS).logits, expected)
    assert model.peft_config["default"].lora_alpha == 8
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_llama_dir)


def test_the_start_depends_on_the_seed_alone(tiny_llama_dir: Path) -> None:
    starts = []
    for seed, drawn in ((1, 0), (1, 7), (2, 0)):
        torch.rand(drawn)
        state = torch.random.get_rng_state()
        model = add_lora(load(tiny_llama_dir), TunerConfig(), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)  # nothing of the run's own numbers is used up
        starts.append(torch.cat([w.flatten() for w in lora_weights(model).values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_adapters_of_a_half_precision_model_are_float32(tiny_llama_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model = add_lora(load(tiny_llama_dir, "bfloat16"), TunerConfig(), seed=1)
    assert {w.dtype for w in lora_weights(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_target_modules_are_checked_by_name(tiny_llama_dir: Path) -> None:
    model = add_lora(load(tiny_llama_dir), TunerConfig(target_modules=("self_attn.q_proj", "v_proj")), seed=1)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in lora_weights(model)} == {
        "q_proj",
        "v_proj",
    }
    with pytest.raises(ConfigError, match="the model has no module called qproj, nope") as caught:
        add_lora(load(tiny_llama_dir), TunerConfig(target_modules=("v_proj", "qproj", "nope")), seed=1)
    assert "down_proj, gate_proj" in caught.value.hint and "q_proj" in caught.value.hint
    with pytest.raises(ConfigError, match="lm_head of this model is both embedding and output layer"):
        add_lora(load(tiny_llama_dir), TunerConfig(target_modules=("all-linear", "lm_head")), seed=1)
    with pytest.raises(ConfigError, match=r"--target_modules: .*not supported"):
        add_lora(load(tiny_llama_dir), TunerConfig(target_modules=("input_layernorm",)), seed=1)


def test_saved_adapters_load_and_merge_to_the_same_logits(tmp_path: Path, tiny_llama_dir: Path) -> None:
    expected = save_lora(tiny_llama_dir, tmp_path / "lora")
    model = load_adapter(load(tiny_llama_dir), tmp_path / "lora", trainable=False)
    assert not model.training and lora_weights(model) == {}
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
        merged = merge(model)
        difference = (merged(IDS).logits - expected).abs().max().item()
        effect = (load(tiny_llama_dir)(IDS).logits - expected).abs().max().item()
    assert effect > 0.1
    assert difference < 1e-5
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_loaded_adapters_can_be_trained_on(tmp_path: Path, tiny_llama_dir: Path) -> None:
    save_lora(tiny_llama_dir, tmp_path / "lora")
    model = load_adapter(load(tiny_llama_dir), tmp_path / "lora", trainable=True)
    assert len(lora_weights(model)) == 2 * 2 * 7


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"num_hidden_layers": 1}])
def test_adapters_of_another_model_are_refused(change, tmp_path, tiny_llama_dir, make_tiny_model_dir) -> None:
    save_lora(tiny_llama_dir, tmp_path / "lora")
    other = make_tiny_model_dir(tmp_path, "llama", **change)
    with pytest.raises(ConfigError, match=f"lora does not fit the model {other}") as caught:
        load_adapter(load(other), tmp_path / "lora", trainable=False)
    assert caught.value.hint == f"it was trained on {tiny_llama_dir}"


def test_adapters_with_holes_are_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    save_lora(tiny_llama_dir, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_adapter(load(tiny_llama_dir), tmp_path / "lora", trainable=False)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"adapter_model.safetensors is damaged"):
        load_adapter(load(tiny_llama_dir), tmp_path / "lora", trainable=False)


def test_merging_nan_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    save_lora(tiny_llama_dir, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: t * float("nan") for name, t in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="the adapters cannot be merged: NaNs"):
        merge(load_adapter(load(tiny_llama_dir), tmp_path / "lora", trainable=False))


def test_the_base_model_is_found_in_either_file(tmp_path: Path, tiny_llama_dir: Path) -> None:
    assert adapter_base(tmp_path) is None and load_run_args(tmp_path) == {}
    recorded = {"base_model_name_or_path": str(tiny_llama_dir)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(recorded))
    assert adapter_base(tmp_path) == str(tiny_llama_dir)
    args = {"model": "smollm2-135m", "system": "Be brief.", "hub_token": "secret"}
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert adapter_base(tmp_path) == "smollm2-135m"
    assert load_run_args(tmp_path) == {"model": "smollm2-135m", "system": "Be brief."}
    # a relative path of another working directory: the resolved one still works
    (tmp_path / "args.json").write_text(json.dumps({"model": "models/mine"}))
    assert adapter_base(tmp_path) == str(tiny_llama_dir)
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ConfigError, match=r"args.json is not valid JSON"):
        adapter_base(tmp_path)
