"""Adapters of a model that is not there: names, shapes and values are those that PEFT gives a whole one."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from swift.config.option import ConfigError
from swift.config.tuner import TunerConfig
from swift.models.adapters import add_lora
from swift.models.outline import Outline, outline_adapters

LORA = TunerConfig(train_type="lora", lora_rank=4, use_rslora=True)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def outline(path, config: TunerConfig = LORA) -> Outline:
    hf = AutoConfig.from_pretrained(path)
    return outline_adapters(hf, config, dtype=torch.float32, base=path, seed=3)


@pytest.mark.parametrize(("family", "fields"), [("qwen3", {}), ("qwen3_moe", EXPERTS)])
def test_adapters_start_as_those_of_a_whole_model(family, fields, make_tiny_model_dir, tmp_path):
    path = make_tiny_model_dir(tmp_path, family, **fields)
    found = outline(path)
    model = add_lora(AutoModelForCausalLM.from_pretrained(path), LORA, seed=3)
    expected = get_peft_model_state_dict(model)
    ours = {
        name: value for f in found.factors.values() for name, value in zip(f.names, (f.a, f.b), strict=True)
    }
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert {f.scaling for f in found.factors.values()} == {16.0}
    assert sum(v.numel() for v in ours.values()) == model.get_nb_trainable_parameters()[0]
    experts = [f for name, f in found.factors.items() if ".experts." in name]
    assert [f.dropout for f in experts] == [0.0] * len(experts)
    assert found.config.base_model_name_or_path == str(path)


def test_names_of_megatron(make_tiny_model_dir, tmp_path):
    path = make_tiny_model_dir(tmp_path, "qwen3_moe", mlp_only_layers=[0], **EXPERTS)
    chosen = replace(LORA, target_modules=("linear_qkv", "linear_fc1"))
    names = {name.removeprefix("model.layers.") for name in outline(path, chosen).factors}
    attention = {f"{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qkv"}
    dense = {"0.mlp.gate_proj.weight", "0.mlp.up_proj.weight"}
    assert names == attention | dense | {"1.mlp.experts.gate_up_proj"}
    assert outline(path, replace(chosen, target_modules=("linear_proj", "o_proj"))).factors.keys() == {
        f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)
    }


def test_what_is_refused(tiny_qwen3_dir, tmp_path):
    with pytest.raises(ConfigError, match="the model has no module called qkv_proj"):
        outline(tiny_qwen3_dir, replace(LORA, target_modules=("qkv_proj",)))
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="megatron does not train what use_dora True adds"):
        outline(tiny_qwen3_dir, TunerConfig(train_type="lora", adapters=(str(tmp_path),)))
