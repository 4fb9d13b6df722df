"""Mistakes with `megatron` are one line, before weights are read, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
from test_megatron_runs import done, write_rows


@pytest.fixture(scope="module")
def converted(megatron_workers, tiny_qwen3_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "mcore"
    done(megatron_workers.run(f"export --model {tiny_qwen3_dir} --to_mcore true --output_dir {out}".split()))
    return out


def spoiled(converted: Path, folder: Path) -> dict[str, Path]:
    """Copies of a converted model that a run cannot start from."""
    found = {name: shutil.copytree(converted, folder / name) for name in ("half", "cut", "gone", "wide")}
    (found["half"] / "iter_0000001/.metadata").unlink()
    (file,) = found["cut"].glob("iter_*/*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    shutil.rmtree(found["gone"] / "iter_0000001")
    (found["wide"] / "manifest.json").unlink()
    config = json.loads((found["wide"] / "config.json").read_text())
    (found["wide"] / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    return found


def with_layers(model: Path, copy: Path, *types: str) -> Path:
    """A copy whose config.json names these types of layers."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_types": types}))
    return copy


def test_what_a_run_cannot_start_from(megatron_workers, converted, tiny_llama_dir, tiny_qwen3_dir, tmp_path):
    data, out = write_rows(tmp_path / "rows.jsonl", 8), tmp_path / "out"
    paths = spoiled(converted, tmp_path) | {"whole": converted, "llama": tiny_llama_dir}
    paths["short"] = with_layers(tiny_qwen3_dir, tmp_path / "short", "full_attention")
    paths["mixed"] = with_layers(tiny_qwen3_dir, tmp_path / "mixed", "full_attention", "linear_attention")
    for text, message in (
        ("--load {half}", "iter_0000001 has no .metadata: it was not written to the end"),
        ("--load {cut}", "/cut/iter_0000001: iter_0000001/__0_0.distcp has 1000 bytes instead of "),
        ("--load {gone}", "/gone has no iter_0000001, which its latest_checkpointed_iteration.txt names"),
        ("--load {wide}", "does not fit the model: decoder.layers.mlp.linear_fc1.weight is [2, 256, 64]"),
        ("--load {whole} --model {llama}", ": its model_type is qwen3, not llama"),
        ("--load {llama} --model {whole}", "is a HuggingFace directory, and --model "),
        ("--load {whole} --finetune false", "holds weights alone: --finetune false has nothing"),
        ("--load {whole} --tensor_model_parallel_size 2", "2 does not divide the 1 process(es)"),
        ("--load {whole} --tensor_model_parallel_size 3", "3 does not divide the 1 process(es)"),
        ("--load {whole} --micro_batch_size 3", "--global_batch_size 16 is not a multiple of "),
        (
            "--load {whole} --recompute_granularity full --recompute_method uniform --recompute_num_layers 3",
            "--recompute_num_layers 3 does not divide the 2 layers in a row on a process (it can be 1, 2)",
        ),
        ("--model {short}", "cannot be loaded: `num_hidden_layers` (2) must be equal to the number"),
        ("--model {mixed}", "megatron does not have layers of type linear_attention"),
        ("--model {llama} --expert_model_parallel_size 2", "_size 2: the model has no experts"),
    ):  # fmt: skip
        words = ["megatron", "sft", *text.format(**paths).split(), "--dataset", str(data), "--save", str(out)]
        result = megatron_workers.run(words)
        told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.code == 2 and len(told) == 1 and message in told[0], (text, result.stderr[-2000:])
        assert not out.exists(), text
