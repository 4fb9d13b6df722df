"""A head on the last token of a text in place of the language model's own: reward models, classifiers."""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.models.load import load_weights

HEAD = "score"  # the name of the head in every decoder of transformers


def load_scoring_model(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_labels: int,
    dtype: str | None,
    attention: str | None,
    device: torch.device,
    seed: int | None,
) -> PreTrainedModel:
    """The model with a head of `num_labels` outputs, in HF's format for sequence classification.

    `seed`: of the weights of a new head; none = the checkpoint must have one. Raises ConfigError otherwise.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        model = load_weights(
            AutoModelForSequenceClassification, path,
            dtype=dtype, attention=attention, device=device, num_labels=num_labels,
            may_lack=() if seed is None else (f"{HEAD}.weight",),
        )  # fmt: skip
    if not isinstance(getattr(model, HEAD, None), torch.nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no layer called {HEAD}", hint="take another model")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model
