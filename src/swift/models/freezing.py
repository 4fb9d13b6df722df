"""Full training of a part of the weights: what the --freeze_* and --trainable_* flags choose."""

import re

from torch import nn

from swift.config.option import ConfigError
from swift.config.tuner import TunerConfig


def freeze(model: nn.Module, config: TunerConfig) -> None:
    """Sets requires_grad of every parameter: first what is frozen, then what is trained all the same.

    ConfigError for a name or a pattern that no parameter has, and where nothing is left to train.
    """
    model.requires_grad_(True)
    named = list(model.named_parameters())
    budget = config.freeze_parameters_ratio * sum(p.numel() for _, p in named)
    for _, parameter in named:  # in the order of the model: embedding, then layers from the first
        budget -= parameter.numel()
        if budget < 0:
            break
        parameter.requires_grad_(False)
    for flags, trained in ((("freeze_parameters", "freeze_parameters_regex"), False),
                           (("trainable_parameters", "trainable_parameters_regex"), True)):  # fmt: skip
        for name in flags:
            given = getattr(config, name)
            for text in (given,) if isinstance(given, str) else given or ():
                pattern = re.compile(text if isinstance(given, str) else f"^{re.escape(text)}")
                found = [parameter for known, parameter in named if pattern.search(known)]
                if not found:
                    raise ConfigError(
                        f"--{name} {text}: the model has no such parameter",
                        hint=f"a whole name is {named[len(named) // 2][0]}",
                    )
                for parameter in found:
                    parameter.requires_grad_(trained)
    if not any(p.requires_grad for _, p in named):
        raise ConfigError(
            "the --freeze flags leave nothing to train", hint="name some --trainable_parameters"
        )
