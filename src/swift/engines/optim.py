"""Parameter groups, optimizer and learning-rate schedule from an OptimConfig."""

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from swift.config.optim import OptimConfig


def group_parameters(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases and norms (fewer than two axes) do not, as is usual since GPT-2."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig, learning_rate: float) -> Optimizer:
    """AdamW. Source: decoupled weight decay, arXiv:1711.05101."""
    return torch.optim.AdamW(
        group_parameters(model, config.weight_decay),
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=config.optim == "adamw_torch_fused" or None,
    )


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """--warmup_steps, else the share --warmup_ratio of all steps, rounded up."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)


def build_scheduler(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    """Warm-up, then the named decay to the end of training."""
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(config, total_steps),
        num_training_steps=total_steps,
    )
