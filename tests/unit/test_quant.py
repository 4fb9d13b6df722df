"""Adapters on weights that are held in few bits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.config.quant import QuantConfig
from swift.config.tuner import TunerConfig
from swift.data.collate import collate
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora, load_adapter, merge
from swift.models.load import load_model
from swift.models.quant import build_quantization
from swift.objectives.sft import Sft
from swift.template.tokenize import Encoded

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


def load(path: Path, quant: QuantConfig | None = None) -> torch.nn.Module:
    return load_model(path, dtype=None, attention=None, device=CPU, quant=quant)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_on_weights_in_few_bits(bits: int, tiny_llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quant = QuantConfig(quant_method="bnb", quant_bits=bits)
    plain, held = logits(load(tiny_llama_dir)), logits(load(tiny_llama_dir, quant))
    assert 1e-4 < (held - plain).abs().max() < 1.0
    model = add_lora(load(tiny_llama_dir, quant), TunerConfig(lora_rank=4, lora_dropout=0.0), seed=1)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").base_layer
    weight = layer.weight.detach().clone()
    assert weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert weight.numel() == 64 * 128 // (2 if bits == 4 else 1)
    config = OptimConfig(lr_scheduler_type="constant")
    engine = TransformersEngine(model, config, learning_rate=1e-2, total_steps=4, own_attention=False)
    ids = np.random.RandomState(0).randint(3, 250, (2, 12)).astype(np.int32)
    batch = collate([Encoded(row, row, None) for row in ids])
    losses = []
    for _ in range(4):
        total, count = engine.forward_backward([batch], Sft()).pairs["loss/tokens"]
        losses.append(total / count)
        engine.optim_step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert torch.equal(layer.weight, weight)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="weights that are quantised cannot be handed to vLLM"):
        next(engine.weights())
    expected = logits(model)
    engine.save(tmp_path, resumable=False).write()
    assert torch.equal(logits(load_adapter(load(tiny_llama_dir, quant), tmp_path, trainable=False)), expected)
    # A merge goes into the weights as they were before they were held in few bits.
    merged = merge(load_adapter(load(tiny_llama_dir), tmp_path, trainable=False))
    effect = (expected - held).abs().max()
    assert (logits(merged) - plain - (expected - held)).abs().max() < 0.3 * effect


def test_what_the_flags_say() -> None:
    config = build_quantization(QuantConfig(quant_method="bnb"), torch.bfloat16)
    assert config.load_in_4bit and config.bnb_4bit_compute_dtype == torch.bfloat16
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    flags = {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_type": "fp4"}
    config = build_quantization(QuantConfig(quant_method="bnb", **flags), torch.bfloat16)
    assert config.bnb_4bit_compute_dtype == torch.float32 and config.bnb_4bit_quant_type == "fp4"
    assert build_quantization(QuantConfig(quant_method="bnb", quant_bits=8), torch.float32).load_in_8bit


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ({"quant_bits": 4}, {}, "--quant_bits 4 has no effect without --quant_method"),
        ({"quant_method": "bnb"}, {"train_type": "full"}, "--quant_method bnb cannot train all weights"),
        ({"quant_method": "bnb"}, {"slicer": "--fsdp"}, "--quant_method bnb with --fsdp is not supported"),
        ({"quant_method": "bnb"}, {"init_weights": "pissa"}, "--init_weights pissa takes its start out of"),
        ({"quant_method": "bnb"}, {}, "--quant_method bnb needs the package bitsandbytes"),
    ],
)
def test_what_cannot_be_held_in_few_bits(flags: dict, options: dict, message: str, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        QuantConfig(**flags).check(**{"train_type": "lora", "slicer": None, "init_weights": "true"} | options)
    assert caught.value.message.startswith(message)
    if "package" in message:
        assert caught.value.hint == "pip install 'bitsandbytes>=0.46'"
