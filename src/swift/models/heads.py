"""A head on the last token of a text in place of the language model's own: reward models, classifiers."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from safetensors import safe_open
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from swift.config.option import ConfigError
from swift.models.directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from swift.models.load import load_model
from swift.utils import env

HEAD = "score"  # the name of the head in every decoder of transformers
SUFFIX = "ForSequenceClassification"


def count_labels(path: Path) -> int | None:
    """Outputs of the head that a model or a checkpoint of adapters has; none = it is a language model."""
    adapter = path / ADAPTER_CONFIG
    if adapter.is_file():
        if read_json(adapter).get("task_type") != TaskType.SEQ_CLS:
            return None
        with safe_open(path / ADAPTER_WEIGHTS[0], framework="pt") as tensors:
            name = next(name for name in tensors.keys() if name.endswith(f"{HEAD}.weight"))  # noqa: SIM118
            return int(tensors.get_slice(name).get_shape()[0])
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    names = config.get("architectures") or []
    is_head = any(name.endswith(SUFFIX) for name in names)
    return len(config.get("id2label") or (0, 0)) if is_head else None


def load_scoring_model(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_labels: int,
    seed: int | None,
    problem: str | None = None,
    **loading: Any,
) -> PreTrainedModel:
    """The model with a head of `num_labels` outputs, in HF's format for sequence classification.

    `seed`: of the weights of a new head; none = the checkpoint must have one. Raises ConfigError otherwise.
    `problem`: what its outputs are, for config.json; none = what is there. `loading`: as `load_model` has it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        model = load_model(
            path, auto_class=AutoModelForSequenceClassification, num_labels=num_labels,
            may_lack=() if seed is None else (f"{HEAD}.weight",), **loading,
        )  # fmt: skip
    if not isinstance(getattr(model, HEAD, None), torch.nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no layer called {HEAD}", hint="take another model")
    complete_config(model.config, tokenizer, problem)
    return model


def verdict_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Yes and no. Raises ConfigError where the tokenizer has no token for one of them."""
    found = []
    for kind, usual in (("POSITIVE", "yes"), ("NEGATIVE", "no")):
        name = f"GENERATIVE_RERANKER_{kind}_TOKEN"
        word = env.read(name, usual)
        token = tokenizer.get_vocab().get(word)
        if token is None:
            raise ConfigError(
                f"--task_type generative_reranker: the tokenizer has no token {word!r}",
                hint=f"name another one with {name}",
            )
        found.append(token)
    return found[0], found[1]


def complete_config(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, problem: str | None
) -> None:
    """Notes in a config with a head what others need to ask it."""
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.problem_type = problem or config.problem_type


def scoring_config(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, num_labels: int, problem: str | None
) -> PretrainedConfig:
    """What config.json says of a model of `config` with a head of `num_labels` outputs."""
    found = copy.deepcopy(config)
    found.num_labels = num_labels
    found.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
    complete_config(found, tokenizer, problem)
    return found
