"""Adapters that start out of the weights themselves: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775).

What an adapter starts with is taken out of its weight, W - s B0 A0, so that their sum answers as before. A
checkpoint has to work on the untouched W, in any program: it holds adapters of twice the rank, [A; A0] and
[B, -B0], whose product is what training changed. Going on from one takes the halves apart again.
"""

import math
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor

NAME = "default"  # PEFT's name of the only adapter


def starts_from_weights(init_weights: str) -> bool:
    return init_weights.startswith(("pissa", "olora"))


def linear_adapters(model: PeftModel) -> Iterator[tuple[str, Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))


def take_starts(model: PeftModel, init_weights: str) -> None:
    """Computes the starts of all adapters on linear layers and takes them out of the weights, in place."""
    for _, layer in linear_adapters(model):
        weight = layer.get_base_layer().weight
        whole = weight.data.clone()
        if init_weights == "olora":
            layer.olora_init(NAME)
        else:
            layer.pissa_init(NAME, init_weights)
        layer.get_base_layer().weight.data = whole
        start_a, start_b = (factors[NAME].weight.detach().clone() for factors in (layer.lora_A, layer.lora_B))
        take_out(layer, start_a, start_b)


def take_out(layer: Linear, start_a: Tensor, start_b: Tensor) -> None:
    """Subtracts s B0 A0 from the layer's weight. B0 [out, rank], A0 [rank, in] stay beside it as buffers."""
    weight = layer.get_base_layer().weight
    start_a, start_b = start_a.to(weight.device), start_b.to(weight.device)
    weight.data = (weight.data.float() - (layer.scaling[NAME] * start_b) @ start_a).to(weight.dtype)
    layer.register_buffer("start_A", start_a, persistent=False)
    layer.register_buffer("start_B", start_b, persistent=False)


def has_starts(model: PeftModel) -> bool:
    return any("start_A" in dict(layer.named_buffers(recurse=False)) for _, layer in linear_adapters(model))


def with_starts(
    model: PeftModel, tensors: dict[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Whole adapter tensors by name and their config, as adapters of twice the rank."""
    tensors = dict(tensors)
    for name, layer in linear_adapters(model):
        a, b = f"{name}.lora_A.{NAME}.weight", f"{name}.lora_B.{NAME}.weight"
        tensors[a] = torch.cat([tensors[a], layer.start_A.to(tensors[a])])
        tensors[b] = torch.cat([tensors[b], -layer.start_B.to(tensors[b])], dim=1)
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the scale stays what it is
    config.r *= 2
    return tensors, config


def load_starts(model: PeftModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes the starts that `with_starts` made out of the weights; the rest, as the model names it."""
    tensors = dict(tensors)
    for name, layer in linear_adapters(model):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        trained_a, start_a = tensors[a].chunk(2)
        trained_b, start_b = tensors[b].chunk(2, dim=1)
        take_out(layer, start_a, -start_b)
        tensors[a], tensors[b] = trained_a.contiguous(), trained_b.contiguous()
    return tensors
