"""LoRA adapters through PEFT: add, load, merge, and what a checkpoint says about its base model.

Not here: saving (the training engine), the checks of a merged directory (export/merge.py).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from swift.config.option import ConfigError, is_secret
from swift.config.tuner import TunerConfig
from swift.models.directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_directory, read_json

ALL_LINEAR = "all-linear"
RUN_ARGS = "args.json"
NAMES_SHOWN = 8


def add_lora(model: PreTrainedModel, config: TunerConfig, *, seed: int) -> PeftModel:
    """The model with fresh adapters, its own weights frozen.

    The same seed gives the same adapters whatever was drawn before. Adapters of a bfloat16 or float16 model
    are float32 (PEFT's default): updates at usual learning rates would be lost in the short mantissa.
    """
    peft_config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if model.can_generate() else TaskType.SEQ_CLS,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=choose_targets(model, config.target_modules),
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(), quiet(FutureWarning):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, peft_config)
        except ValueError as error:  # a module that exists and cannot have an adapter, such as a norm
            raise ConfigError(f"--target_modules: {str(error).splitlines()[0]}") from error


@contextmanager
def quiet(*categories: type[Warning]) -> Iterator[None]:
    """Leaves out PEFT's remarks on other libraries, and those that we turn into errors."""
    with warnings.catch_warnings():
        for category in categories:
            warnings.simplefilter("ignore", category)
        yield


def choose_targets(model: nn.Module, names: tuple[str, ...]) -> str | list[str]:
    """PEFT's `target_modules`; ConfigError for a name that no module of the model has."""
    if names == (ALL_LINEAR,):
        return ALL_LINEAR  # PEFT leaves the output layer out
    if not names or ALL_LINEAR in names:
        raise ConfigError(f"--target_modules is {ALL_LINEAR} alone, or names of modules")
    modules = [name for name, _ in model.named_modules()]
    unknown = [name for name in names if not any(m == name or m.endswith(f".{name}") for m in modules)]
    if unknown:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        shown = sorted({name.rpartition(".")[2] for name in linear})[:NAMES_SHOWN]
        raise ConfigError(
            f"--target_modules: the model has no module called {', '.join(unknown)}",
            hint=f"linear layers of this model: {', '.join(shown)}",
        )
    return list(names)


def load_adapter(model: PreTrainedModel, path: Path, *, trainable: bool) -> PeftModel:
    """The model with the adapters of a checkpoint; ConfigError when they were made for another model."""
    check_adapter_directory(path)
    wrong_model = ConfigError(
        f"--adapters {path} does not fit the model {model.name_or_path}",
        hint=f"it was trained on {adapter_base(path)}",
    )
    try:
        stored = stored_names(path)
        with quiet(FutureWarning, UserWarning):
            peft_model = PeftModel.from_pretrained(
                model, str(path), is_trainable=trainable, torch_device=str(model.device)
            )
    except SafetensorError as error:
        raise ConfigError(f"--adapters {path}: {ADAPTER_WEIGHTS[0]} is damaged: {error}") from error
    except (RuntimeError, ValueError) as error:  # other shapes; none of the modules
        raise wrong_model from error
    # PEFT only warns about adapters that are missing or left over, and runs with zeros in their place.
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if stored is not None and {n for n in stored ^ expected if "lora_" in n}:
        raise wrong_model
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
