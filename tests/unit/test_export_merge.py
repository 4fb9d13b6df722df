"""`swift export --merge_lora true`: the files, the proof of equality, and what must not happen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from swift.config.option import ConfigError, build
from swift.config.runs import ExportRun
from swift.config.tuner import TunerConfig
from swift.export import merge as merging
from swift.export.compare import ROUNDING, compare_logits, compute_logits, render_texts
from swift.export.run import parse_size, run_export
from swift.models.adapters import add_lora, load_adapter
from swift.models.load import load_model, load_tokenizer

RUN_ARGS = {
    "model": "models/mine",
    "model_revision": "v2",
    "torch_dtype": "bfloat16",
    "system": "Be brief.",
    "max_length": 64,
    "hub_token": "secret",
}


def load(path: Path, dtype: str | None = None) -> torch.nn.Module:
    return load_model(path, dtype=dtype, attention=None, device=torch.device("cpu"))


def save_checkpoint(base: Path, path: Path, run_args: dict | None = RUN_ARGS) -> Path:
    """A checkpoint with adapters that change the logits."""
    model = add_lora(load(base), TunerConfig(), seed=5)
    torch.manual_seed(11)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path)
    if run_args is not None:
        (path / "args.json").write_text(json.dumps(run_args))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    return save_checkpoint(tiny_llama_dir, tmp_path / "run" / "checkpoint-9")


def export(checkpoint: Path, **flags: object) -> int:
    return run_export(build(ExportRun, {"merge_lora": True, "adapters": (str(checkpoint),), **flags}))


def visible(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merged_model_reloads_in_plain_transformers_with_the_adapters_logits(
    family, request, tmp_path, capfd
) -> None:
    base = request.getfixturevalue(f"tiny_{family}_dir")
    checkpoint = save_checkpoint(base, tmp_path / "checkpoint-9")
    assert export(checkpoint) == 0
    said = capfd.readouterr().err
    merged = tmp_path / "checkpoint-9-merged"
    assert "PASS" in said and str(merged) in said
    assert visible(tmp_path) == ["checkpoint-9", "checkpoint-9-merged"]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    texts = render_texts(tokenizer)
    opening = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
    assert texts[0].startswith(f"{opening}<|im_start|>assistant\n")
    reference = compute_logits(load_adapter(load(base), checkpoint, trainable=False), tokenizer, texts)
    reloaded = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert reloaded.dtype == torch.float32
    found = compare_logits(reference, compute_logits(reloaded, tokenizer, texts))
    changed = compare_logits(reference, compute_logits(load(base), tokenizer, texts))
    assert found.largest < 1e-5 and found.agreement == 1.0
    assert changed.largest > 0.1


def test_everything_but_the_weights_is_the_base_models(checkpoint: Path, tiny_llama_dir: Path) -> None:
    (checkpoint / "args.json").write_text(json.dumps({**RUN_ARGS, "system": None}))
    assert export(checkpoint) == 0
    merged = checkpoint.with_name("checkpoint-9-merged")
    same = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in same:
        assert (merged / name).read_bytes() == (tiny_llama_dir / name).read_bytes()
    base_config = json.loads((tiny_llama_dir / "config.json").read_text())
    assert json.loads((merged / "config.json").read_text()) == base_config
    assert visible(merged) == sorted([*same, "args.json", "config.json", "model.safetensors"])
    assert {p.stat().st_mode & 0o777 for p in merged.iterdir()} == {0o644}
    assert merged.stat().st_mode & 0o777 == 0o755
    base, stored = load_file(tiny_llama_dir / "model.safetensors"), load_file(merged / "model.safetensors")
    assert base.keys() == stored.keys()
    assert torch.equal(base["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert not torch.equal(
        base["model.layers.0.mlp.up_proj.weight"], stored["model.layers.0.mlp.up_proj.weight"]
    )


def test_args_json_says_what_inference_needs_and_no_secret(checkpoint: Path, tiny_llama_dir: Path) -> None:
    assert export(checkpoint) == 0
    merged = checkpoint.with_name("checkpoint-9-merged")
    args = json.loads((merged / "args.json").read_text())
    assert args["model"] == str(merged) and args["adapters"] == []
    assert args["model_revision"] is None and args["torch_dtype"] == "float32"  # what was written
    assert args["system"] == "Be brief." and args["max_length"] == 64
    assert args["base_model"] == str(tiny_llama_dir) and args["merged_adapters"] == str(checkpoint)
    assert "secret" not in (merged / "args.json").read_text()


def test_bfloat16_is_written_and_checked_to_its_own_tolerance(
    checkpoint: Path, tmp_path: Path, capfd
) -> None:
    assert export(checkpoint, torch_dtype="bfloat16", output_dir=str(tmp_path / "half")) == 0
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    said = capfd.readouterr().err
    assert "rounded to bfloat16: " in said and "(allowed 0.02)" in said and "PASS" in said


def test_shards_are_as_large_as_asked(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, max_shard_size="150KB", output_dir=str(tmp_path / "out")) == 0
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1 and max(s.stat().st_size for s in shards) < 160_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("100", 100)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "0GB", "five"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--max_shard_size"):
        parse_size(text)


def test_an_existing_directory_is_left_alone_unless_allowed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert export(checkpoint, output_dir=str(out)) == 0  # an empty one is no loss
    with pytest.raises(ConfigError, match="exists and is not empty") as caught:
        export(checkpoint, output_dir=str(out))
    assert "--exist_ok true" in caught.value.hint
    (out / "notes.txt").write_text("mine")
    (out / "model.safetensors").rename(
        out / "model-00001-of-00002.safetensors"
    )  # of an earlier, sharded export
    assert export(checkpoint, output_dir=str(out), exist_ok=True) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]
    AutoModelForCausalLM.from_pretrained(out)
    assert visible(tmp_path) == ["out", "run"]


def test_a_merge_that_changes_the_logits_exits_with_1_and_leaves_nothing(
    checkpoint, monkeypatch, capfd
) -> None:
    def forget_a_layer(model: torch.nn.Module) -> torch.nn.Module:
        merged = model.merge_and_unload()
        with torch.no_grad():
            merged.model.layers[1].mlp.up_proj.weight.add_(0.01)
        return merged

    monkeypatch.setattr(merging, "merge", forget_a_layer)
    assert export(checkpoint) == 1
    said = capfd.readouterr().err
    assert "merged in float32" in said and "FAIL" in said and "was not written" in said
    assert visible(checkpoint.parent) == ["checkpoint-9"]


def test_files_that_do_not_hold_the_merged_model_exit_with_1(
    checkpoint, tiny_llama_dir, monkeypatch, capfd
) -> None:
    save = merging.save

    def save_the_base(plan, merged, staging: Path) -> None:
        save(plan, merged, staging)
        shutil.copyfile(tiny_llama_dir / "model.safetensors", staging / "model.safetensors")

    monkeypatch.setattr(merging, "save", save_the_base)
    assert export(checkpoint) == 1
    assert "reloaded from disk: logits differ" in capfd.readouterr().err
    assert visible(checkpoint.parent) == ["checkpoint-9"]


def test_comparison_numbers_and_verdicts() -> None:
    reference = [torch.tensor([[0.0, 10.0], [10.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    same = compare_logits(reference, [t.clone() for t in reference])
    assert (same.mean, same.largest, same.scale, same.agreement, same.positions) == (0.0, 0.0, 10.0, 1.0, 3)
    assert same.equal and all(same.close(dtype) for dtype in ROUNDING)
    shifted = compare_logits(reference, [t + 0.002 for t in reference])  # no distribution changes
    assert shifted.largest == pytest.approx(0.002, rel=1e-3) and not shifted.equal
    assert shifted.divergence == pytest.approx(0.0, abs=1e-7) and shifted.close("float32")
    other = compare_logits([torch.tensor([[0.0, 1.0]])], [torch.tensor([[1.0, 0.0]])])
    # KL of (1 - p, p) from (p, 1 - p) with p = 1 / (1 + e): (1 - 2 p) * 1 nat
    assert other.divergence == pytest.approx(1 - 2 / (1 + 2.718281828), rel=1e-5)
    assert other.agreement == 0.0 and not other.equal and not other.close("bfloat16")
    broken = compare_logits(reference, [t * float("nan") for t in reference])
    assert not broken.equal and not broken.close("bfloat16")


def test_adapters_that_do_nothing_are_reported(tmp_path: Path, tiny_llama_dir: Path, capfd) -> None:
    add_lora(load(tiny_llama_dir), TunerConfig(), seed=1).save_pretrained(tmp_path / "new")
    assert export(tmp_path / "new") == 0
    assert "change nothing: were they trained?" in capfd.readouterr().err


def test_the_base_model_is_found_or_named(tmp_path: Path, tiny_llama_dir: Path, make_tiny_model_dir) -> None:
    checkpoint = save_checkpoint(tiny_llama_dir, tmp_path / "peft-only", run_args=None)
    assert export(checkpoint) == 0
    args = json.loads((tmp_path / "peft-only-merged" / "args.json").read_text())
    assert args["base_model"] == str(tiny_llama_dir)
    gone = {"model": str(tmp_path / "gone")}
    (checkpoint / "args.json").write_text(json.dumps(gone))
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="gone: no such directory") as caught:
        export(checkpoint, output_dir=str(tmp_path / "x"))
    assert "--model names another" in caught.value.hint
    with pytest.raises(ConfigError, match="do not name their model"):
        export(checkpoint, output_dir=str(tmp_path / "x"), load_args=False)
    assert export(checkpoint, output_dir=str(tmp_path / "x"), model=str(tiny_llama_dir)) == 0
    other = make_tiny_model_dir(tmp_path, "llama", hidden_size=32)
    with pytest.raises(ConfigError, match=r"does not fit .*lora_A\S* is \[8, 64\], not \[8, 32\]"):
        export(checkpoint, output_dir=str(tmp_path / "y"), model=str(other))
    assert "y" not in visible(tmp_path)


def test_a_tokenizer_that_training_changed_is_kept(checkpoint: Path, tiny_llama_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(checkpoint)
    assert export(checkpoint) == 0
    merged = load_tokenizer(checkpoint.with_name("checkpoint-9-merged"))
    assert merged.chat_template.endswith(tokenizer.chat_template)  # after the system prompt


def test_mistakes_in_words(checkpoint: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to export"):
        run_export(build(ExportRun, {"adapters": (str(checkpoint),)}))
    with pytest.raises(ConfigError, match="--merge_lora takes one checkpoint"):
        run_export(build(ExportRun, {"merge_lora": True, "adapters": (str(checkpoint), "b")}))
    with pytest.raises(ConfigError, match=r"--adapters .*nope: no such directory"):
        export(tmp_path / "nope")
    with pytest.raises(ConfigError, match="is the source itself"):
        export(checkpoint, output_dir=str(checkpoint), exist_ok=True)
    own = tmp_path / "own"
    shutil.copytree(tiny_llama_dir, own)
    with pytest.raises(ConfigError, match="is the base model itself"):
        export(checkpoint, model=str(own), output_dir=str(own), exist_ok=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        export(checkpoint, output_dir=str(tmp_path / "file" / "out"))
    with pytest.raises(ConfigError, match="is a file"):
        export(checkpoint, output_dir=str(tmp_path / "file"))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ConfigError, match="is quantised"):
        export(checkpoint, model=str(own))
    lora = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps(lora | {"peft_type": "IA3"}))
    with pytest.raises(ConfigError, match="of type IA3, only LORA can be merged"):
        export(checkpoint)
    assert visible(checkpoint.parent) == ["checkpoint-9"]


def test_nan_in_the_adapters_stops_the_export(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    save_file({name: t * float("nan") for name, t in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="cannot be merged"):
        export(checkpoint)
    assert visible(checkpoint.parent) == ["checkpoint-9"]
