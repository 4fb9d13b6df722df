"""Parameter groups, optimizer and learning-rate schedule from an OptimConfig.

Owns: which optimizer a name stands for, what of it is saved beside the state of each parameter.
Not here: that state (engines/transformers), which weights are trained (models).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, get_scheduler

from swift.config.optim import OPTIMIZERS, OptimConfig
from swift.config.option import ConfigError, flatten
from swift.plugins.hooks import optimizers_map
from swift.plugins.registry import load_object

Groups = list[dict[str, Any]]
# What a step changes in a group beside the weights: the rate, and the averages of schedule-free optimizers.
PROGRESS = ("lr", "k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")


class Together(Optimizer):
    """Several optimizers, each with parameters of its own, as one: they share its groups and its state."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {"lr": parts[0].defaults["lr"]})
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "no optimizer here evaluates the loss again"
        for part in self.parts:
            part.step()


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, learning_rate: float
) -> Groups:
    """One group for each pair of rate and decay that occurs, the plain rate first.

    Matrices decay; biases and norms (fewer than two axes) do not, as is usual since GPT-2. With LoRA+ the
    matrices B learn faster. Source: arXiv:2402.12354.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        fast = config.lorap_lr_ratio is not None and ".lora_B." in name
        rate = learning_rate * (config.lorap_lr_ratio or 0.0) if fast else learning_rate
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    keys = sorted(groups, key=lambda key: (key[0] != learning_rate, key[0], -key[1]))
    return [{"params": groups[key], "lr": key[0], "weight_decay": key[1]} for key in keys]


def build_optimizer(
    model: nn.Module, config: OptimConfig, learning_rate: float
) -> tuple[Optimizer, LRScheduler | None]:
    """The optimizer, and the schedule of a plugin that brings its own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.name == "muon":
        return build_muon(model, named, config, learning_rate), None
    if config.name not in OPTIMIZERS:
        settings = SimpleNamespace(**{**flatten(config), "learning_rate": learning_rate})
        return optimizers_map.find(config.name)(settings, model, None)
    path, taken, own = OPTIMIZERS[config.name]
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    options = {k: adam[k] for k in taken} | own | parse_settings(config.optim_args)
    groups = group_parameters(named, config, learning_rate)
    return build_class(path, groups, learning_rate, options, config), None


def build_class(
    path: str, groups: Groups, learning_rate: float, options: dict[str, Any], config: OptimConfig
) -> Optimizer:
    """`path` names the class; ConfigError for a setting that it does not have."""
    try:
        return load_object(path)(groups, lr=learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--optim {config.name}: {error}", hint="see --optim_args") from error


def build_muon(
    model: nn.Module, named: list[tuple[str, nn.Parameter]], config: OptimConfig, learning_rate: float
) -> Optimizer:
    """Muon for hidden matrices; AdamW for embeddings, the output layer, stacks of experts, norms and biases.

    Updates of matrices are scaled to the size of AdamW's, so that one rate and one decay serve both.
    Source: arXiv:2502.16982, section 2.2.
    """
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if isinstance(model, PreTrainedModel | PeftModel) and model.get_output_embeddings() is not None:
        outside.append(model.get_output_embeddings())
    ends = {id(p) for module in outside for p in module.parameters()}
    hidden = [(name, p) for name, p in named if p.ndim == 2 and id(p) not in ends]
    rest = [(name, p) for name, p in named if p.ndim != 2 or id(p) in ends]
    if not hidden:
        raise ConfigError("muon has nothing to do: no hidden matrix is trained", hint="use adamw_torch")
    path, _, own = OPTIMIZERS["muon"]
    groups = group_parameters(hidden, config, learning_rate)
    parts = [build_class(path, groups, learning_rate, own | parse_settings(config.optim_args), config)]
    if rest:
        betas = (config.adam_beta1, config.adam_beta2)
        adam = group_parameters(rest, config, learning_rate)
        parts.append(torch.optim.AdamW(adam, lr=learning_rate, betas=betas, eps=config.adam_epsilon))
    return Together(parts)


def parse_settings(text: str | None) -> dict[str, Any]:
    """`momentum=0.9,nesterov=true` as keywords. Raises ConfigError."""
    settings = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        name, equals, value = part.partition("=")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
        if not equals:
            raise ConfigError(f"--optim_args expects name=value, got {part!r}")
    return settings


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """--warmup_steps, else the share --warmup_ratio of all steps, rounded up."""
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil((config.warmup_steps or config.warmup_ratio) * total_steps)


def build_scheduler(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    """Warm-up, then the named decay to the end of training."""
    settings: dict[str, Any] = dict(config.lr_scheduler_kwargs)
    warmup = warmup_steps(config, total_steps)
    if config.lr_scheduler_type == "warmup_stable_decay":
        # A tenth of the steps decays unless the flag says otherwise. Source: arXiv:2404.06395, section 4.
        settings.setdefault("num_decay_steps", math.ceil(0.1 * total_steps))
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=settings,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--lr_scheduler_kwargs {json.dumps(settings)}: {error}") from error
    if config.min_lr:
        assert isinstance(scheduler, LambdaLR)
        share = config.min_lr / scheduler.base_lrs[0]
        scheduler.lr_lambdas = [raise_floor(rule, share, warmup) for rule in scheduler.lr_lambdas]
    return scheduler


def raise_floor(rule: Callable[[int], float], share: float, warmup: int) -> Callable[[int], float]:
    """A decay that ends at `share` of the peak instead of at 0; the warm-up stays as it is."""
    return lambda step: rule(step) if step < warmup else share + (1 - share) * rule(step)


def check_optim(config: OptimConfig) -> None:
    """Raises ConfigError for settings that optimizer or schedule do not have, before a model is loaded."""
    layer = nn.Linear(2, 2, bias=False)
    if config.name in OPTIMIZERS:
        optimizer, _ = build_optimizer(layer, config, 1e-3)
    else:
        optimizers_map.find(config.name)  # a plugin's function may need the real model
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    build_scheduler(optimizer, config, 10)


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether it trains the weights at another point than the one it would answer with (arXiv:2405.15682)."""
    return type(optimizer).__module__.startswith("schedulefree")


@contextmanager
def answering(optimizer: Optimizer) -> Iterator[None]:
    """Inside it the weights are those that a trained model answers with."""
    if not is_schedule_free(optimizer):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


def begin_training(optimizer: Optimizer) -> None:
    """Moves loaded weights from the point that answers to the one that is trained."""
    if is_schedule_free(optimizer):
        optimizer.train()


def progress_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the steps so far have changed in each group."""
    return [{k: group[k] for k in PROGRESS if k in group} for group in optimizer.param_groups]
