"""Weights of linear layers as 8-bit floats with a scale for every block of 128 x 128.

The format of DeepSeek-V3 and of transformers' FineGrainedFP8Config, which vLLM and SGLang read too.
Source: arXiv:2412.19437, section 3.3.2; the scales are named as in that model's files.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from swift.config.option import ConfigError
from swift.models.directory import INDEX_FILES, weight_files
from swift.models.load import load_config
from swift.models.targets import ROUTERS
from swift.utils.files import write_json
from swift.utils.log import say

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
EXPERT = re.compile(r"\.experts\.\d+\.\w+$")
# Layers that inference engines join into one, so that all of them have scales or none has.
JOINED = re.compile(r"\.(?:[qkv]_proj|(?:gate|up)_proj)$")


def write_fp8(source: Path, staging: Path) -> dict[str, Any]:
    """Writes the weights, a file for each file of the source; what config.json has to say about them.

    One file is in memory at a time.
    """
    files = weight_files(source)
    if any(file.suffix != ".safetensors" for file in files):
        raise ConfigError(f"--quant_method fp8 reads safetensors, and {source} has {files[0].name}")
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    layers, kept = choose_layers(load_config(source), shapes)
    say(f"fp8: {len(layers)} linear layers in blocks of {BLOCK} x {BLOCK}, {len(kept)} kept as they are")
    place: dict[str, str] = {}
    total = 0
    for file in files:
        written: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if name.removesuffix(".weight") in layers and name.endswith(".weight"):
                    written[name], written[f"{name}_scale_inv"] = quantize_blocks(tensor)
                else:
                    written[name] = tensor
        save_file(written, staging / file.name, {"format": "pt"})
        place |= dict.fromkeys(written, file.name)
        total += sum(tensor.nbytes for tensor in written.values())
    if len(files) > 1:
        write_json(staging / INDEX_FILES[0], {"metadata": {"total_size": total}, "weight_map": place})
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }


def choose_layers(config: PretrainedConfig, shapes: dict[str, list[int]]) -> tuple[set[str], list[str]]:
    """Linear layers that are written in 8 bits, and those that stay as they are. `shapes`: of all tensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = {n for n, module in linear.items() if module is head or n.rpartition(".")[2] in ROUTERS}
    wanted = set(linear) - kept | {
        name for key in shapes if EXPERT.search(name := key.removesuffix(".weight"))
    }
    unknown = sorted(name for name in wanted if f"{name}.weight" not in shapes)
    if unknown:
        raise ConfigError(f"--quant_method fp8: the files have no {unknown[0]}.weight", hint="try bnb")
    ragged = {name for name in wanted if any(size % BLOCK for size in shapes[f"{name}.weight"])}
    groups = {JOINED.sub("", name) for name in ragged if JOINED.search(name)}
    ragged |= {name for name in wanted if JOINED.search(name) and JOINED.sub("", name) in groups}
    if not wanted - ragged:
        raise ConfigError(
            f"--quant_method fp8: no layer of this model consists of blocks of {BLOCK} x {BLOCK}",
            hint="--quant_method bnb takes layers of any size",
        )
    return wanted - ragged, sorted(kept | ragged)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[M, N] -> float8 [M, N] and what each block is to be multiplied with, float32 [M/128, N/128]."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    factors = torch.where(largest > 0, LARGEST / largest, 1.0)
    scaled = (blocks * factors[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return scaled.reshape(weight.shape).to(torch.float8_e4m3fn), 1 / factors
