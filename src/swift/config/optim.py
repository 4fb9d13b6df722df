"""Optimizer and learning rate."""

from dataclasses import dataclass

from swift.config.option import option

SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    learning_rate: float | None = option(
        None, help="peak; none = 1e-4 with adapters, 1e-5 full", range=(0, None)
    )
    lr_scheduler_type: str = option("cosine", help="shape of the decay", choices=SCHEDULES)
    warmup_ratio: float = option(0.0, help="share of the steps that warm up", range=(0, 1))
    warmup_steps: int = option(
        0, help="warm-up length; wins over --warmup_ratio", unit="steps", range=(0, None)
    )
    weight_decay: float = option(0.1, help="AdamW weight decay (not on biases and norms)", range=(0, None))
    adam_beta1: float = option(0.9, help="AdamW decay of the mean", range=(0, 1))
    adam_beta2: float = option(0.95, help="AdamW decay of the variance", range=(0, 1))
    adam_epsilon: float = option(1e-8, help="AdamW epsilon", range=(0, None))
    max_grad_norm: float = option(1.0, help="clip the global gradient norm here; 0 = never", range=(0, None))
    optim: str = option("adamw_torch", help="optimizer", choices=("adamw_torch", "adamw_torch_fused"))
