"""Reward models: found before anything slow, loaded beside the model that is trained, asked for numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import getsourcefile
from pathlib import Path
from typing import Any

import torch

from swift.config.model import ModelConfig
from swift.config.option import ConfigError
from swift.config.rewards import RewardConfig
from swift.config.template import TemplateConfig
from swift.engines.transformers.scorer import TextScorer
from swift.models.heads import count_labels
from swift.models.hub import resolve_model
from swift.models.load import load_model, load_tokenizer
from swift.plugins.calling import tell_error
from swift.plugins.hooks import rm_plugins
from swift.rewards.panel import Answer, RewardError, read_values
from swift.template.chat import ChatTemplate


@dataclass(frozen=True)
class RewardSource:
    """A model of --reward_model as it was found. `plugin`: none = its score."""

    path: Path
    plugin: Callable[..., Any] | None

    @property
    def name(self) -> str:
        """In metrics: the folder's."""
        return self.path.resolve().name

    @property
    def plugin_file(self) -> str:
        return (getsourcefile(self.plugin) or "") if self.plugin else ""


@dataclass(frozen=True)
class RewardModel:
    """A member of the panel. `ask`: rows, each the answer's columns and messages, to a number a row."""

    name: str
    ask: Callable[[list[dict[str, Any]]], Any]
    file: str = ""  # of the plugin

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        rows = [{**a.columns, "messages": list(a.messages), "request_id": a.request_id} for a in answers]
        asked = f"--reward_model {self.name}"
        try:
            returned = self.ask(rows)
        except ConfigError:
            raise
        except Exception as error:  # a plugin is a stranger's program
            place = f"{answers[0].place} to {answers[-1].place}"
            raise RewardError(f"{asked}: {place}: {tell_error(error, self.file)}") from error
        return read_values(asked, returned, answers)


def find_reward_models(config: RewardConfig, model: ModelConfig) -> list[RewardSource]:
    """Raises ConfigError unless each has a head with one output, or a plugin that reads something else."""
    names, given = config.reward_model, config.reward_model_plugin
    plugins = [rm_plugins.find(name) for name in given] or [None]
    found = []
    for name, plugin in zip(names, plugins * len(names), strict=False):  # one for all, or one for each
        path = resolve_model(name, **model.hub)
        labels = count_labels(path)
        if plugin is None and labels != 1:
            has = "is a language model without a score head" if labels is None else f"has {labels} scores"
            raise ConfigError(
                f"--reward_model {name} {has}",
                hint="train one with swift rlhf --rlhf_type rm, or name what reads it: --reward_model_plugin",
            )
        found.append(RewardSource(path, plugin))
    return found


def load_reward_models(
    sources: Sequence[RewardSource], model: ModelConfig, device: torch.device
) -> list[RewardModel]:
    """Whole and frozen on `device`, each with its own tokenizer and chat template."""
    models = []
    for source in sources:
        labels, config = count_labels(source.path), TemplateConfig()
        if labels is None:
            network = load_model(
                source.path, dtype=model.torch_dtype, attention=model.attn_impl, device=device
            )
            template = ChatTemplate(load_tokenizer(source.path), config)
        else:
            scorer = TextScorer.load(
                source.path, num_labels=labels, model=model, template=config, device=device
            )
            network, template = scorer.model, scorer.template
        if source.plugin is None:
            models.append(RewardModel(source.name, partial(_first_output, scorer)))
            continue
        try:
            asked = source.plugin(model=network.requires_grad_(False), template=template)
        except Exception as error:  # a plugin is a stranger's program
            place = tell_error(error, source.plugin_file)
            raise ConfigError(f"--reward_model_plugin of {source.name}: {place}") from error
        models.append(RewardModel(source.name, asked, source.plugin_file))
    return models


def _first_output(scorer: TextScorer, rows: list[dict[str, Any]]) -> list[float]:
    return scorer.score_chats([row["messages"] for row in rows])[:, 0].tolist()
