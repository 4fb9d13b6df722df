"""LoRA adapters through PEFT: add, load, merge, and what a checkpoint says about its base model.

Not here: saving (the training engine), the checks of a merged directory (export/merge.py).
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from swift.config.option import ConfigError, is_secret
from swift.config.tuner import TunerConfig
from swift.models.directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_directory, read_json
from swift.models.starts import starts_from_weights, take_starts
from swift.models.targets import choose_targets

RUN_ARGS = "args.json"
# How torch says which tensor is of another shape.
SHAPES = re.compile(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)")
# What a checkpoint's args.json settles, by group. Lengths and loss settings belong to training alone.
TAKEN = {
    "model": ("model", "model_revision", "use_hf", "torch_dtype"),
    "template": ("system", "enable_thinking", "response_prefix", "agent_template", "use_chat_template"),
}


def add_lora(model: PreTrainedModel, config: TunerConfig, *, seed: int, resumed: bool = False) -> PeftModel:
    """The model with fresh adapters, its own weights frozen.

    The same seed gives the same adapters whatever was drawn before. Adapters of a bfloat16 or float16 model
    are float32 (PEFT's default): updates at usual learning rates would be lost in the short mantissa.
    `resumed`: weights of a checkpoint come next, and with them what was taken out of the model's own.
    """
    targets = choose_targets(model, config)
    from_weights = starts_from_weights(config.init_weights)
    plain = {"true": True, "false": False}.get(config.init_weights, config.init_weights)
    peft_config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if model.can_generate() else TaskType.SEQ_CLS,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0 if targets.parameters else config.lora_dropout,  # it has no form for bare weights
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        modules_to_save=targets.whole or None,
        ensure_weight_tying=bool(targets.whole) and model.config.get_text_config().tie_word_embeddings,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if from_weights else plain,
        bias=config.lora_bias,
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(), quiet(FutureWarning, UserWarning):
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, peft_config)
        except ValueError as error:  # a module that exists and cannot have an adapter, such as a norm
            raise ConfigError(f"--target_modules: {str(error).splitlines()[0]}") from error
        if from_weights and not resumed:
            take_starts(peft_model, config.init_weights)
    return set_up(peft_model, config)


def set_up(model: PeftModel, config: TunerConfig) -> PeftModel:
    """Dropout before the adapters of modules, and the dtype of all of them: neither is in its file."""
    dtype = getattr(torch, config.lora_dtype) if config.lora_dtype else None
    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            for name in module.lora_dropout:
                rate = config.lora_dropout
                module.lora_dropout[name] = nn.Dropout(rate) if rate else nn.Identity()
    for name, parameter in model.named_parameters():
        if dtype and "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


def leave_casting_to_autocast(model: nn.Module) -> None:
    """Stops PEFT from casting whole activations to float32: autocast would cast them straight back.

    For models that run under autocast alone. Without dropout the numbers are equal to the bit.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def describe_adapters(model: PeftModel) -> str:
    """`8 modules (k_proj, q_proj), 4 bare weights, such as stacks of experts (down_proj, gate_up_proj)`."""
    layers: list[str] = []
    weights: list[str] = []
    whole: list[str] = []
    for name, module in model.named_modules():
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        if isinstance(module, ParamWrapper):
            weights.append(last if module.parameter_name == "weight" else module.parameter_name)
        elif isinstance(module, LoraLayer):
            layers.append(last)
        elif isinstance(module, ModulesToSaveWrapper):
            whole.append(last)
    parts = (
        ("modules", layers), ("bare weights, such as stacks of experts", weights), ("trained whole", whole)
    )  # fmt: skip
    return ", ".join(f"{len(n)} {what} ({', '.join(sorted(set(n)))})" for what, n in parts if n)


@contextmanager
def quiet(*categories: type[Warning]) -> Iterator[None]:
    """Leaves out PEFT's remarks on other libraries, and those that we turn into errors."""
    with warnings.catch_warnings():
        for category in categories:
            warnings.simplefilter("ignore", category)
        yield


def load_adapter(
    model: PreTrainedModel | PeftModel, path: Path, *, trainable: bool, name: str = "default"
) -> PeftModel:
    """The model with the adapters of a checkpoint; ConfigError when they were made for another model.

    One that has adapters already gets these beside them, under their own name.
    """
    check_adapter_directory(path)
    misfit = f"--adapters {path} does not fit the model {model.name_or_path}"
    hint = f"it was trained on {adapter_base(path)}"
    try:
        stored = stored_names(path)
        with quiet(FutureWarning, UserWarning):
            options = {"is_trainable": trainable, "torch_device": str(model.device), "adapter_name": name}
            if isinstance(model, PeftModel):
                model.load_adapter(str(path), **options)
                peft_model = model
            else:
                peft_model = PeftModel.from_pretrained(model, str(path), **options)
    except SafetensorError as error:
        raise ConfigError(f"--adapters {path}: {ADAPTER_WEIGHTS[0]} is damaged: {error}") from error
    except (RuntimeError, ValueError) as error:  # other shapes; none of the modules
        shapes = SHAPES.search(str(error))
        named = f": {shapes[1]} is [{shapes[2]}], not [{shapes[3]}]" if shapes else ""
        raise ConfigError(misfit + named, hint=hint) from error
    # PEFT only warns about adapters that are missing or left over, and runs with zeros in their place.
    expected = set(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))
    if stored is not None and {n for n in stored ^ expected if "lora_" in n}:
        raise ConfigError(misfit, hint=hint)
    return peft_model


def stored_names(path: Path) -> set[str] | None:
    """Names of the tensors in adapter_model.safetensors; None for the older pickled format."""
    file = path / ADAPTER_WEIGHTS[0]
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


def merge(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapters folded into its weights, in place; ConfigError when they hold NaN."""
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ConfigError(f"the adapters cannot be merged: {str(error).splitlines()[0]}") from error


def tokenizer_directory(model: Path, adapter: Path | None) -> Path:
    """Where a tokenizer is loaded from: the adapters', unless they have none."""
    return adapter if adapter and (adapter / "tokenizer_config.json").is_file() else model


def adapter_base(path: Path) -> str | None:
    """The base model of a checkpoint: as the run named it in args.json, else as adapter_config.json does.

    A relative path in args.json may mean nothing from where we are; adapter_config.json has it resolved.
    """
    named = load_run_args(path).get("model")
    config = path / ADAPTER_CONFIG
    recorded = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    if named is None:
        return recorded
    is_gone = "/" in named and not Path(named).expanduser().is_dir()
    return recorded if is_gone and recorded and Path(recorded).is_dir() else named


def load_run_args(path: Path) -> dict[str, Any]:
    """Flat {flag: value} of the run that wrote a checkpoint; {} when it has no args.json."""
    file = path / RUN_ARGS
    if not file.is_file():
        return {}
    return {name: value for name, value in read_json(file).items() if not is_secret(name)}
