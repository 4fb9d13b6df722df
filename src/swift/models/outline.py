"""The adapters of a model without the model: what PEFT would add to it, and how these adapters start.

An engine that builds the layers by itself learns from it which weights have adapters, under which names, with
which values: all as `swift sft` has them. Not here: the layers of such an engine.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from swift.config.option import ConfigError
from swift.config.tuner import TunerConfig
from swift.models.adapters import add_lora, load_adapter, set_up
from swift.models.heads import HEAD
from swift.models.targets import linear_layers

# What Megatron calls the layers, and what these consist of in published models.
MEGATRON_NAMES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_q_proj": ("q_proj",),
    "linear_q_down_proj": ("q_a_proj",),
    "linear_q_up_proj": ("q_b_proj",),
    "linear_kv_down_proj": ("kv_a_proj_with_mqa",),
    "linear_kv_up_proj": ("kv_b_proj",),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj", "gate_up_proj"),
    "linear_fc2": ("down_proj",),
}
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """The adapter of one weight, or of a stack of experts' weights.

    stem: what its tensors' names in adapter files begin with.
    a: [r, in], of experts [E * r, in]; b: [out, r], of experts [out, r * E], as PEFT keeps them.
    """

    stem: str
    a: Tensor
    b: Tensor
    rank: int
    scaling: float
    dropout: float

    @property
    def names(self) -> tuple[str, str]:
        return f"{self.stem}.lora_A.weight", f"{self.stem}.lora_B.weight"


@dataclass(frozen=True)
class Outline:
    """All adapters, by the whole name of the weight that each belongs to."""

    config: LoraConfig
    factors: dict[str, Factors]
    head: Tensor | None = None  # [num_labels, D] of adapters that bring one along

    @property
    def num_parameters(self) -> int:
        return sum(f.a.numel() + f.b.numel() for f in self.factors.values())


def outline_adapters(
    hf: PretrainedConfig,
    tuner: TunerConfig,
    *,
    dtype: torch.dtype,
    base: Path,
    seed: int,
    resumed: Path | None = None,
    num_labels: int | None = None,
) -> Outline:
    """New adapters, those of --adapters, or those of the checkpoint `resumed`.

    base: the model's directory; dtype: of its weights; num_labels: of a head, which is trained whole.
    Raises ConfigError for names that the model does not have, and for what is not plain LoRA.
    """
    model = hollow_model(hf, dtype, base, num_labels)
    source = Path(tuner.adapters[0]).expanduser() if tuner.adapters else None
    if source is None:
        adapted = add_lora(model, in_hf_names(model, tuner), seed=seed)
    else:
        adapted = set_up(load_adapter(model, resumed or source, trainable=True), tuner)
    config = adapted.peft_config["default"]
    assert isinstance(config, LoraConfig)
    of_head = (None, {HEAD, "classifier"}) if num_labels else (None,)  # PEFT names both
    whole = set(config.modules_to_save) if config.modules_to_save else None
    faults = {
        "use_dora": config.use_dora,
        "bias": config.bias != "none",
        "modules_to_save": whole not in of_head,
    }
    for name, is_fault in faults.items():
        if is_fault:
            raise ConfigError(
                f"--adapters {source}: megatron does not train what {name} {getattr(config, name)} adds",
                hint="use swift sft",
            )
    head = adapted.get_submodule(f"{PREFIX}{HEAD}").modules_to_save["default"] if num_labels else None
    given = head is not None and source is not None
    return Outline(config, dict(find_factors(adapted)), head.weight.detach() if given else None)


def hollow_model(
    hf: PretrainedConfig, dtype: torch.dtype, base: Path, num_labels: int | None
) -> PreTrainedModel:
    """The modules of transformers, each weight one number seen as often as the shape says."""
    with torch.device("meta"):
        if num_labels:
            hf = copy.deepcopy(hf)
            hf.num_labels = num_labels
        kind = AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_config(hf, dtype=dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(number, requires_grad=False))
    model.tie_weights()
    model.name_or_path = str(base)
    return model


def in_hf_names(model: PreTrainedModel, tuner: TunerConfig) -> TunerConfig:
    """The flags with Megatron's names of layers in --target_modules replaced by those of `model`."""
    asked = [name for name in tuner.target_modules if name in MEGATRON_NAMES]
    if not asked:
        return tuner
    ends = {end for name in asked for end in MEGATRON_NAMES[name]}
    layers, weights = linear_layers(model)
    modules = [name for name in tuner.target_modules if name not in MEGATRON_NAMES]
    modules += [name for name in layers if name in ends]
    parameters = [name for name in weights if ends & set(name.split("."))]
    return replace(
        tuner,
        target_modules=tuple(modules),
        target_parameters=(*tuner.target_parameters, *parameters),
    )


def find_factors(model: PeftModel) -> list[tuple[str, Factors]]:
    """Every adapter of `model` with the name of its weight, `model.layers.0.self_attn.q_proj.weight`."""
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        module = name.removeprefix(PREFIX).replace(".base_layer", "")
        end = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        dropout = layer.lora_dropout["default"]
        factors = Factors(
            stem=name,
            a=layer.lora_A["default"].weight.detach(),
            b=layer.lora_B["default"].weight.detach(),
            rank=layer.r["default"],
            scaling=layer.scaling["default"],
            dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
        )
        found.append((f"{module}.{end}", factors))
    return found
