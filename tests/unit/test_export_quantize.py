"""`swift export --quant_method`: the files, what they give, and what is refused."""

import importlib.util
import json
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from swift.config.option import ConfigError, build
from swift.config.runs import ExportRun
from swift.export import quantize
from swift.export.compare import compare_logits, compute_logits, render_texts
from swift.export.fp8 import choose_layers, quantize_blocks
from swift.export.run import run_export
from swift.models.load import load_config, load_model, load_tokenizer

CPU = torch.device("cpu")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_tiny_model_dir) -> Path:
    """A model whose layers consist of whole blocks, with the args of its run."""
    path = make_tiny_model_dir(tmp_path_factory.mktemp("source"), "qwen3", **SIZES)
    (path / "args.json").write_text(json.dumps({"system": "Be brief.", "model": "mine"}))
    return path


def export(source: Path, output: Path, **flags: object) -> int:
    return run_export(build(ExportRun, {"model": str(source), "output_dir": str(output), **flags}))


def compare(source: Path, output: Path) -> float:
    """Divergence of the next-token distributions, in nats, on the texts of the source's tokenizer."""
    tokenizer = load_tokenizer(source)
    models = [load_model(path, dtype=None, attention=None, device=CPU) for path in (source, output)]
    return compare_logits(*(compute_logits(m, tokenizer, render_texts(tokenizer)) for m in models)).divergence


def test_blocks_are_scaled_to_the_range_of_their_own() -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    weight[:128, :128] *= 1000
    weight[128:, 256:] = 0
    held, scales = quantize_blocks(weight)
    assert held.dtype == torch.float8_e4m3fn and scales.shape == (2, 3)
    again = held.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    # e4m3 has 3 bits after the leading one: half a step is 1/16 of a number, or of the smallest normal one.
    error = (again - weight).abs()
    floor = scales.repeat_interleave(128, 0).repeat_interleave(128, 1) * 2**-10
    assert bool((error <= weight.abs() / 16 + floor).all())
    assert torch.equal(again[128:, 256:], weight[128:, 256:])
    assert held.float().abs().max() == 448
    quantizer = types.SimpleNamespace(quantization_config=FineGrainedFP8Config())
    theirs = Fp8Quantize(quantizer).convert({"x.weight": weight})
    assert torch.equal(theirs["x.weight"].float(), held.float())
    assert torch.equal(theirs["x.weight_scale_inv"], scales)


def test_fp8_is_what_transformers_reads(source: Path, tmp_path: Path, capfd) -> None:
    assert export(source, tmp_path / "out", quant_method="fp8") == 0
    said = capfd.readouterr().err
    assert "fp8: 14 linear layers in blocks of 128 x 128" in said and ": PASS" in said
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored["model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (2, 1)
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    assert 1e-6 < compare(source, tmp_path / "out") < 1e-3
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert args["model"] == str(tmp_path / "out") and args["system"] == "Be brief."
    assert "Be brief." in (tmp_path / "out" / "chat_template.jinja").read_text()
    with pytest.raises(ConfigError, match="is quantised already"):
        export(tmp_path / "out", tmp_path / "again", quant_method="fp8")


def test_layers_that_engines_join_have_scales_together(make_tiny_model_dir, tmp_path: Path) -> None:
    narrow = make_tiny_model_dir(tmp_path, "llama", **(SIZES | {"num_key_value_heads": 1}))
    shapes = {name: list(t.shape) for name, t in load_file(narrow / "model.safetensors").items()}
    layers, kept = choose_layers(load_config(narrow), shapes)
    own = [name.removeprefix("model.layers.0.") for name in sorted(layers) if "layers.0" in name]
    assert own == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj"]
    assert "model.layers.0.self_attn.q_proj" in kept and "lm_head" in kept


@pytest.mark.parametrize("bits", [4, 8])
def test_bnb_is_what_transformers_reads(bits: int, source: Path, tmp_path: Path, capfd) -> None:
    pytest.importorskip("bitsandbytes")
    assert export(source, tmp_path / "out", quant_method="bnb", quant_bits=bits) == 0
    assert f"bnb, {bits} bits: next-token distributions differ by" in capfd.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config[f"load_in_{bits}bit"]
    assert 1e-6 < compare(source, tmp_path / "out") < (1e-2 if bits == 4 else 1e-3)
    sizes = [sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (source, tmp_path / "out")]
    assert sizes[1] < 0.4 * sizes[0]
    if bits == 4:
        flags = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
        assert export(source, tmp_path / "fp4", quant_method="bnb", **flags) == 0
        written = json.loads((tmp_path / "fp4" / "config.json").read_text())["quantization_config"]
        assert {name: written[name] for name in flags} == flags
        assert compare(source, tmp_path / "fp4") > compare(
            source, tmp_path / "out"
        )  # nf4 fits weights better


def test_a_result_too_far_from_its_source_is_not_kept(source, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(quantize, "ALLOWED", {8: 1e-9})
    assert export(source, tmp_path / "out", quant_method="fp8") == 1
    said = capfd.readouterr().err
    assert "FAIL" in said and f"{tmp_path / 'out'} was not written" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_rows_choose_the_weights(method: str, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]}
            for i in range(20)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"quant_method": method, "dataset": (str(tmp_path / "rows.jsonl"),), "quant_n_samples": 16}
    if method == "awq" and not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--quant_method awq needs a GPU: its library does"):
            export(source, tmp_path / "out", **flags)
        return
    with pytest.raises(ConfigError, match="--group_size 48 does not divide the 128 inputs of"):
        export(source, tmp_path / "out", **flags, group_size=48)
    assert export(source, tmp_path / "out", **flags, group_size=32) == 0
    assert 1e-6 < compare(source, tmp_path / "out") < 1e-2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quant_bits": 8, "merge_lora": True, "adapters": ("a",)}, "--quant_bits 8 has no effect without"),
        ({"quant_method": "fp8", "quant_bits": 4}, "--quant_method fp8 has 8 bits, not 4"),
        ({"quant_method": "awq", "quant_bits": 8}, "--quant_method awq has 4 bits, not 8"),
        ({"quant_method": "awq"}, "--quant_method awq needs --dataset"),
        (
            {"quant_method": "fp8", "bnb_4bit_quant_type": "fp4"},
            "--bnb_4bit_quant_type has no effect without",
        ),
        ({"quant_method": "gptq"}, "--quant_method gptq needs --dataset"),
        (
            {"quant_method": "bnb", "group_size": 64},
            "--group_size has no effect without --quant_method gptq or awq",
        ),
        ({"quant_method": "bnb", "adapters": ("a",)}, "--quant_method takes whole weights, not adapters"),
        ({"quant_method": "bnb", "to_ollama": True}, "--to_ollama and --quant_method are 2 exports"),
        ({"to_ollama": True, "push_to_hub": True}, "--to_ollama and --push_to_hub are 2 exports"),
        ({"push_to_hub": True}, "--push_to_hub needs --hub_model_id"),
        ({"hub_model_id": "a/b", "to_ollama": True}, "--hub_model_id has no effect without --push_to_hub"),
        ({"push_to_hub": True, "hub_model_id": "a/b", "adapters": ("a",)}, "are two things to push"),
        ({"to_peft_format": True}, "--to_peft_format needs --adapters"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ExportRun, {"model": "m", **flags}).check()


def test_what_cannot_be_done(source: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no layer of this model consists of blocks of 128 x 128"):
        export(tiny_llama_dir, tmp_path / "out", quant_method="fp8")
    if importlib.util.find_spec("llmcompressor") is None:
        with pytest.raises(
            ConfigError, match="--quant_method gptq needs the package llmcompressor"
        ) as caught:
            export(source, tmp_path / "out", quant_method="gptq", dataset=("rows.jsonl",))
        assert caught.value.hint == "pip install 'swiftune[gptq]'"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(source, tmp_path / "out", quant_method="fp8")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["notes.txt"]
