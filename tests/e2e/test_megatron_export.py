"""Conversion commands as users type them, down to answers of the result; and what they refuse."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TO_MCORE = "export --model {model} --to_mcore true --torch_dtype bfloat16 --output_dir {out} "
TO_HF = "export --mcore_model {model} --to_hf true --torch_dtype bfloat16 --output_dir {out} "
CHECKED = "--test_convert_precision true"
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
WEIGHTS = "model.safetensors"


def type_command(workers, text: str, processes: int = 1, **paths: Path):
    return workers.run([word.format(**paths) for word in text.split()], processes)


def equal_weights(first: Path, second: Path, dtype: torch.dtype) -> bool:
    ours, theirs = load_all(first), load_all(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k].to(dtype), theirs[k]) for k in ours)


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def test_there_and_back_and_asked(megatron_workers, workers, tiny_qwen3_dir, tmp_path):
    """The pairs of commands of the write-ups, one process each; the result answers."""
    mcore, back = tmp_path / "Qwen3-8B-mcore", tmp_path / "vx-xxx-hf"
    result = type_command(megatron_workers, TO_MCORE + CHECKED, model=tiny_qwen3_dir, out=mcore)
    assert result.code == 0, result.stderr
    numbers = "number of parameters: 102784, sum of parameters: "
    for line in (
        f"hf: {numbers}", f"mcore: {numbers}", "token_diff: 0\n", "token_diff (with loss): 0\n",
        "mean_diff: 0.0, max_diff: 0.0 (Please check that mean_diff is less than 0.1).",
    ):  # fmt: skip
        assert line in result.stderr
    assert {path.name for path in mcore.iterdir()} >= {
        "args.json", "config.json", "tokenizer.json", "manifest.json", "iter_0000001",
        "latest_checkpointed_iteration.txt",
    }  # fmt: skip
    args = json.loads((mcore / "args.json").read_text())
    assert (args["model"], args["torch_dtype"]) == (str(tiny_qwen3_dir), "bfloat16")
    result = type_command(megatron_workers, TO_HF + CHECKED, model=mcore, out=back)
    assert result.code == 0, result.stderr
    assert "mean_diff: 0.0, max_diff: 0.0" in result.stderr
    assert equal_weights(tiny_qwen3_dir, back, torch.bfloat16)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "Who are you?", "response": "I am"}\n')
    answers = tmp_path / "answers.jsonl"
    result = workers.run(
        ["infer", "--model", str(back), "--val_dataset", str(rows), "--max_new_tokens", "3",
         "--result_path", str(answers)]
    )  # fmt: skip
    assert result.code == 0 and len(answers.read_text().splitlines()) == 1, result.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_several_processes_convert_one_model(megatron_workers, make_tiny_model_dir, tmp_path):
    """Experts over two processes, there; layers over two, back, in shards that both write."""
    model = make_tiny_model_dir(tmp_path, "qwen3_moe", **MOE)
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    there = f"megatron {TO_MCORE} --expert_model_parallel_size 2 {CHECKED}".replace("bfloat16", "float32")
    result = type_command(megatron_workers, there, 2, model=model, out=mcore)
    assert result.code == 0, result.stderr[-3000:]
    assert "token_diff: 0\n" in result.stderr
    again = f"megatron {TO_HF} --pipeline_model_parallel_size 2 --max_shard_size 100KB {CHECKED}"
    result = type_command(megatron_workers, again, 2, model=mcore, out=back)
    assert result.code == 0, result.stderr[-3000:]
    assert "token_diff: 0\n" in result.stderr
    assert len(list(back.glob("*.safetensors"))) == 3
    assert equal_weights(model, back, torch.bfloat16)


def test_adapters_are_folded_into_what_was_converted(megatron_workers, converted, tiny_qwen3_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "run/checkpoint-2")
    text = f"{TO_HF} --mcore_adapters {{adapters}}".replace("bfloat16", "float32")
    paths = {"adapters": tmp_path / "run", "out": tmp_path / "merged"}
    result = type_command(megatron_workers, text, model=converted, **paths)
    assert result.code == 0, result.stderr
    assert "reloaded from disk: " in result.stderr
    before, after = load_all(tiny_qwen3_dir), load_all(tmp_path / "merged")
    changed = {key for key, value in before.items() if not torch.equal(value.bfloat16().float(), after[key])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


@pytest.fixture(scope="module")
def converted(megatron_workers, tiny_qwen3_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "mcore"
    result = type_command(megatron_workers, TO_MCORE, model=tiny_qwen3_dir, out=out)
    assert result.code == 0, result.stderr
    return out


def drop_metadata(path: Path) -> None:
    (path / "iter_0000001/.metadata").unlink()


def cut_off(path: Path) -> None:
    (path / "manifest.json").unlink()  # as other programs leave it
    (file,) = path.glob("iter_0000001/*.distcp")
    file.write_bytes(file.read_bytes()[:1000])


def scramble_metadata(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "iter_0000001/.metadata").write_bytes(b"nothing")


def make_deeper(path: Path) -> None:
    change_config(path, num_hidden_layers=3, layer_types=["full_attention"] * 3)


def make_wider(path: Path) -> None:
    change_config(path, intermediate_size=256)


def make_llama(path: Path) -> None:
    change_config(path, model_type="llama", architectures=["LlamaForCausalLM"])


def change_config(path: Path, **fields: object) -> None:
    (path / "manifest.json").unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_metadata, "iter_0000001 has no .metadata: it was not written to the end"),
        (cut_off, "iter_0000001/__0_0.distcp has 1,000 bytes instead of "),
        (scramble_metadata, "iter_0000001/.metadata is damaged: "),
        (
            make_deeper,
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight is [2, 64], not [3, 64]",
        ),
        (make_wider, "does not fit the model: decoder.layers.mlp.linear_fc1.weight is [2, 256, 64], not ["),
        (make_llama, "is of another model: it holds decoder.layers.self_attention.k_layernorm.weight"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_one_line(megatron_workers, converted, tmp_path, spoil, message):
    mcore = shutil.copytree(converted, tmp_path / "mcore")
    spoil(mcore)
    result = type_command(megatron_workers, TO_HF, model=mcore, out=tmp_path / "out")
    assert result.code == 2, result.stderr
    assert message in next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore"]


def lose(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.self_attn.k_proj.weight"]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(64)


def bend(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.zeros(63)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose, "lack 1 tensors, the first is model.layers.1.self_attn.k_proj.weight"),
        (
            add,
            "hold 1 tensors that config.json has no place for, the first is "
            "model.layers.1.self_attn.o_proj.bias",
        ),
        (bend, "do not fit its config.json: model.norm.weight is [63], not [64]"),
    ],
)
def test_files_that_do_not_fit_are_named(megatron_workers, tiny_qwen3_dir, tmp_path, spoil, message):
    model = shutil.copytree(tiny_qwen3_dir, tmp_path / "model")
    weights = load_file(model / WEIGHTS)
    spoil(weights)
    save_file(weights, model / WEIGHTS)
    result = type_command(megatron_workers, TO_MCORE, model=model, out=tmp_path / "out")
    assert result.code == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted(megatron_workers, tiny_qwen3_dir, converted, make_tiny_model_dir, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    damaged = shutil.copytree(tiny_qwen3_dir, tmp_path / "damaged")
    (damaged / WEIGHTS).write_bytes(b"12345678")
    quantised = shutil.copytree(tiny_qwen3_dir, tmp_path / "quantised")
    change_config(quantised, quantization_config={"quant_method": "awq"})
    gpt = shutil.copytree(tiny_qwen3_dir, tmp_path / "gpt")
    change_config(gpt, model_type="gpt_neox")
    full, none = tmp_path / "full", tmp_path / "none"
    for text, path, message in (
        (TO_MCORE, {"model": damaged}, f"error: {damaged / WEIGHTS} cannot be read: "),
        (TO_MCORE, {"model": quantised}, f"{quantised} is quantised: only plain weights"),
        (TO_MCORE, {"model": gpt}, "megatron does not know gpt_neox models"),
        (TO_MCORE, {"out": full}, f"--output_dir {full} exists and is not empty"),
        (TO_MCORE, {"out": tiny_qwen3_dir}, f"--output_dir {tiny_qwen3_dir} is the source itself"),
        (TO_HF, {"model": none}, f"--mcore_model {none}: no such directory"),
    ):
        paths = {"model": tiny_qwen3_dir, "out": tmp_path / "out"} | path
        result = type_command(megatron_workers, text, **paths)
        assert result.code == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_told_before_anything_is_read(megatron_workers, tiny_qwen3_dir, tmp_path):
    hook = f"{__file__}:leave_little"
    for what, message in (
        (
            "memory",
            "takes 201 KiB of host memory, and 100 KiB are free\nhint: megatron export shares the model",
        ),
        ("disk", "the result takes 201 KiB, and 100 KiB are free"),
    ):
        words = TO_MCORE.format(model=tiny_qwen3_dir, out=tmp_path / "out").split()
        result = megatron_workers.run(words, hook=hook, hook_arguments={"what": what})
        assert result.code == 2 and message in result.stderr, result.stderr


def leave_little(rank: int, what: str) -> None:
    import swift.export.megatron as export

    left = 100 * 1024
    if what == "memory":
        export.free_memory = lambda: left
    else:
        export.shutil = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=left))


def test_models_that_differ_fail_the_comparison(megatron_workers):
    result = megatron_workers.run([], hook=f"{__file__}:check_reports")
    assert result.code == 0, result.stderr
    assert (
        "error: the models differ: mean_diff 0.2 (allowed 0.01), 0 of 3 most likely tokens" in result.stderr
    )
    assert "error: the models differ: mean_diff 6.67e-07 (allowed 0.01), 1 of 3 most" in result.stderr
    assert "in bfloat16 other most likely tokens are no failure" in result.stderr


def check_reports(rank: int) -> None:
    from swift.export.precision import report

    answers = torch.tensor([False, True, True])
    logits = torch.tensor([[10.0, 0.0], [10.0, 0.0], [1.0, 1.0 + 2e-6]], dtype=torch.float64)
    swapped = logits.clone()
    swapped[2] = swapped[2].flip(0)
    assert report(logits, logits.clone(), answers, "float32")
    assert not report(logits, logits + 0.2, answers, "float32")
    assert not report(logits, swapped, answers, "float32")
    assert report(logits, swapped, answers, "bfloat16")
    assert not report(logits, logits * float("nan"), answers, "bfloat16")
