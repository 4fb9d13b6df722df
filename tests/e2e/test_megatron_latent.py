"""Models with latent attention through the commands: trained, continued, asked; 8-bit weights made plain."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_megatron_runs import done, train, write_rows

MODEL = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "tie_word_embeddings": False,
}  # fmt: skip
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def model(make_tiny_model_dir, tmp_path_factory) -> Path:
    return make_tiny_model_dir(tmp_path_factory.mktemp("latent"), "deepseek_v3", **MODEL)


def test_biases_of_experts_move_and_are_saved(megatron_workers, workers, model, tmp_path):
    data, save = write_rows(tmp_path / "rows.jsonl", 8), tmp_path / "out"
    words = f"megatron sft --model {model} --dataset {data} --save {save} --max_length 128 --lr 1e-3 "
    words += "--global_batch_size 4 --moe_router_bias_update_rate 0.01 --train_iters 3"
    run, log = train(megatron_workers, words.split(), 1, save)
    assert log[1]["loss"] < log[0]["loss"]
    moved = load_file(run / "checkpoint-3/model.safetensors")[BIAS]
    assert {round(abs(value), 6) for value in moved.tolist()} <= {
        0.01,
        0.03,
    }  # three steps of 0.01, up or down
    rows, answers = tmp_path / "ask.jsonl", tmp_path / "answers.jsonl"
    rows.write_text('{"query": "Who are you?"}\n')
    ask = f"infer --model {run / 'checkpoint-3'} --val_dataset {rows} --result_path {answers}"
    done(workers.run([*ask.split(), "--max_new_tokens", "2"]))
    assert len(answers.read_text().splitlines()) == 1


def test_adapters_have_megatrons_names_and_leave_biases_alone(megatron_workers, model, tmp_path):
    data, save = write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "out"
    words = f"megatron sft --model {model} --dataset {data} --save {save} --max_length 128 --train_iters 1 "
    words += "--global_batch_size 4 --train_type lora --target_modules linear_q_down_proj linear_kv_up_proj "
    words += "--recompute_modules core_attn mla_up_proj "
    run, _ = train(megatron_workers, words.split(), 1, save)
    names = load_file(run / "checkpoint-1/adapter_model.safetensors")
    found = {name.split(".")[6] for name in names}
    assert found == {"q_a_proj", "kv_b_proj"}
    refused = megatron_workers.run([*words.split(), "--moe_router_bias_update_rate", "0.1"])
    assert refused.code == 2
    assert "error: --moe_router_bias_update_rate 0.1: adapters hold no biases" in refused.stderr


def test_8_bit_weights_are_converted_to_plain_ones(megatron_workers, model, tmp_path):
    source, mcore, back = (tmp_path / name for name in ("fp8", "mcore", "back"))
    export = f"export --model {model} --quant_method fp8 --output_dir {source}"
    done(megatron_workers.run(export.split()))
    written = load_file(source / "model.safetensors")
    to_mcore = f"export --model {source} --to_mcore true --torch_dtype float32 --output_dir {mcore}"
    refused = megatron_workers.run([*to_mcore.split(), "--test_convert_precision", "true"])
    assert refused.code == 2 and "there is no plain model to compare with" in refused.stderr
    done(megatron_workers.run(to_mcore.split()))
    to_hf = f"export --mcore_model {mcore} --to_hf true --torch_dtype float32 --output_dir {back}"
    result = done(megatron_workers.run([*to_hf.split(), "--test_convert_precision", "true"]))
    assert "token_diff: 0\n" in result.stderr
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    plain = load_file(back / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(plain[name], written[name].float() * written[f"{name}_scale_inv"])
    assert not any(key.endswith("_scale_inv") for key in plain)
