"""A model directory -> tokenizer and model through transformers; nothing is asked of a hub.

Owns: device, dtype and attention choices, and errors in words for directories that cannot be loaded.
Not here: finding the directory (hub.py), adapters (adapters.py).
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, logging

from swift.config.option import ConfigError
from swift.config.quant import QuantConfig
from swift.models.directory import check_model_directory
from swift.models.quant import build_quantization
from swift.utils import env
from swift.utils.log import warn, warn_once

LOAD_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, StrictDataclassError
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")
# Pad tokens of published models, none of which ends a turn.
PAD_TOKENS = (
    "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|end_of_text|>", "<unk>",
)  # fmt: skip
HALF = (torch.bfloat16, torch.float16)
SLOW_HALF = ("DEFAULT", "AVX2")  # where torch multiplies half precision in a plain loop, some 40 times slower
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def pick_device(name: str | None) -> torch.device:
    """`--device`, checked; None = the first GPU, else the CPU."""
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is not a device", hint="cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, always with a pad token."""
    silence_transformers()
    if not any(file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
        raise ConfigError(f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise cannot_load(f"the tokenizer in {path}", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = choose_pad_token(tokenizer)
    return tokenizer


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token of the vocabulary that fills batches and ends no turn; the end token when there is no other.

    Labels are never masked by this token's id, so the last case trains correctly too.
    """
    known = tokenizer.get_added_vocab()
    names = [token for token in (*PAD_TOKENS, tokenizer.unk_token) if token in known]
    chosen = next((token for token in names if token != tokenizer.eos_token), tokenizer.eos_token)
    if chosen is None:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} has neither a pad token nor an end token",
            hint='name one in tokenizer_config.json, for example "eos_token": "</s>"',
        )
    return chosen


def load_model(
    path: Path,
    *,
    dtype: str | None,
    attention: str | None,
    device: torch.device,
    quant: QuantConfig | None = None,
    auto_class: Any = AutoModelForCausalLM,
    may_lack: tuple[str, ...] = (),
    **config_changes: Any,
) -> PreTrainedModel:
    """The model in evaluation mode on `device`; its linear layers in few bits where `quant` says so.

    dtype: None = config.json's on a GPU, float32 on a CPU. attention: a name of `--attn_impl`, or any other
    that is registered with transformers; None = transformers' choice. may_lack: tensors that may start anew.
    """
    silence_transformers()
    check_model_directory(path)
    by_device = torch.float32 if device.type == "cpu" else "auto"
    wanted = getattr(torch, dtype) if dtype else by_device
    options: dict[str, Any] = {}
    if quant and quant.quant_method:
        if wanted == "auto":
            wanted = load_config(path).dtype or torch.bfloat16
        options = {"quantization_config": build_quantization(quant, wanted), "device_map": {"": device}}
    try:
        model, report = auto_class.from_pretrained(
            path,
            dtype=wanted,
            attn_implementation=choose_attention(attention),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the name
            **config_changes,
            **options,
        )
    except LOAD_ERRORS as error:
        raise cannot_load(f"the model in {path}", error) from error
    # transformers would go on with random values in both cases.
    for name, *shapes in sorted(report["mismatched_keys"]):
        found, wanted = (list(shape) for shape in shapes)
        raise ConfigError(
            f"the weights in {path} do not fit its config.json: {name} is {found}, not {wanted}"
        )
    missing = sorted(set(report["missing_keys"]) - set(may_lack))
    if missing:
        raise ConfigError(f"the weights in {path} lack {len(missing)} tensors, the first is {missing[0]}")
    if options:
        return model.eval()  # is on its device, and cannot be moved
    if device.type == "cpu" and model.dtype in HALF and torch.backends.cpu.get_cpu_capability() in SLOW_HALF:
        name = str(model.dtype).removeprefix("torch.")
        warn_once(f"this CPU cannot multiply {name} fast: weights are rounded to it, arithmetic is float32")
        model = model.float()
    return model.to(device).eval()


def choose_attention(name: str | None) -> str | None:
    """The name as transformers knows it; flash attention that is not there becomes sdpa, with a warning."""
    if name in ("flash_attn", "flash_attention_2"):
        present, name = is_flash_attn_2_available(), "flash_attention_2"
    elif name == "flash_attention_3":
        present = is_flash_attn_3_available()
    else:
        return name
    if not present or not torch.cuda.is_available():
        warn(f"--attn_impl {name} is not installed or there is no GPU for it; using torch's own kernels")
        return "sdpa"
    return name


def context_length(model_or_config: PreTrainedModel | PretrainedConfig) -> int | None:
    """Tokens that the model was made for; None when its config does not say."""
    config = getattr(model_or_config, "config", model_or_config).get_text_config()
    values = [getattr(config, field, None) for field in CONTEXT_FIELDS]  # each family has its own name for it
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def load_config(path: Path) -> PretrainedConfig:
    silence_transformers()
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise cannot_load(f"{path}/config.json", error) from error


def cannot_load(what: str, error: BaseException) -> ConfigError:
    if isinstance(error, StrictDataclassError) and error.__cause__:  # which alone says what is wrong
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ConfigError(f"{what} cannot be loaded: {lines[0].strip()}", hint="SWIFT_DEBUG=1 shows where")


def silence_transformers() -> None:
    """Keeps transformers' progress bars and reports off the screen, except when debugging."""
    if not env.is_on("SWIFT_DEBUG"):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
