"""Optimizer and learning rate."""

from dataclasses import dataclass
from typing import Any

from swift.config.option import ConfigError, option, refuse, require_package

SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
ADAM = ("betas", "eps")
# Optimizer -> its class, which of Adam's settings it takes, and settings of its own.
OPTIMIZERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "adamw_torch": ("torch.optim:AdamW", ADAM, {}),
    "adamw_torch_fused": ("torch.optim:AdamW", ADAM, {"fused": True}),
    "sgd": ("torch.optim:SGD", (), {}),
    # The rate is the schedule's, not its own relative one.
    "adafactor": (
        "transformers.optimization:Adafactor", (), {"scale_parameter": False, "relative_step": False},
    ),
    "muon": ("torch.optim:Muon", (), {"adjust_lr_fn": "match_rms_adamw"}),
    "adamw_8bit": ("bitsandbytes.optim:AdamW8bit", ADAM, {}),
    "adamw_bnb_8bit": ("bitsandbytes.optim:AdamW8bit", ADAM, {}),
    "paged_adamw": ("bitsandbytes.optim:PagedAdamW32bit", ADAM, {}),
    "paged_adamw_32bit": ("bitsandbytes.optim:PagedAdamW32bit", ADAM, {}),
    "paged_adamw_8bit": ("bitsandbytes.optim:PagedAdamW8bit", ADAM, {}),
    "lion_32bit": ("bitsandbytes.optim:Lion", ("betas",), {}),
    "lion_8bit": ("bitsandbytes.optim:Lion8bit", ("betas",), {}),
    "paged_lion_32bit": ("bitsandbytes.optim:PagedLion32bit", ("betas",), {}),
    "paged_lion_8bit": ("bitsandbytes.optim:PagedLion8bit", ("betas",), {}),
    "schedule_free_adamw": ("schedulefree:AdamWScheduleFree", ADAM, {}),
    "schedule_free_radam": ("schedulefree:RAdamScheduleFree", ADAM, {}),
    "schedule_free_sgd": ("schedulefree:SGDScheduleFree", (), {}),
}  # fmt: skip
INSTALL = {"bitsandbytes": "bitsandbytes>=0.46", "schedulefree": "schedulefree>=1.4"}
LEVEL = ("constant", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    learning_rate: float | None = option(None, "peak; none = 1e-4 with adapters, 1e-5 full", min=0)
    lorap_lr_ratio: float | None = option(
        None, "LoRA+: matrices B of the adapters learn this many times as fast; none = as the rest", min=0
    )
    lr_scheduler_type: str = option("cosine", "shape of the decay", choices=SCHEDULES)
    lr_scheduler_kwargs: dict[str, Any] = option({}, 'settings of that shape as JSON, say {"min_lr": 1e-6}')
    min_lr: float = option(0.0, "where the decay ends, instead of at 0", min=0)
    warmup_ratio: float = option(0.0, "share of the steps that warm up", range=(0, 1))
    warmup_steps: float = option(
        0, "warm-up length, or a share of all steps below 1; wins over --warmup_ratio", unit="steps", min=0
    )
    weight_decay: float = option(0.1, "weight decay (not on biases and norms)", min=0)
    adam_beta1: float = option(0.9, "AdamW decay of the mean", range=(0, 1))
    adam_beta2: float = option(0.95, "AdamW decay of the variance", range=(0, 1))
    adam_epsilon: float = option(1e-8, "AdamW epsilon", min=0)
    max_grad_norm: float = option(1.0, "clip the global gradient norm here; 0 = never", min=0)
    optim: str = option("adamw_torch", "optimizer", choices=tuple(OPTIMIZERS))
    optim_args: str | None = option(None, "more settings of it, such as momentum=0.9,nesterov=true")
    optimizer: str | None = option(
        None, "muon, lorap (with --lorap_lr_ratio), or an optimizer of a plugin instead of --optim"
    )

    @property
    def name(self) -> str:
        """The optimizer that counts: one of OPTIMIZERS, or a plugin's."""
        return self.optim if self.optimizer in (None, "lorap") else str(self.optimizer)

    @property
    def package(self) -> str:
        """Where it comes from; that of a plugin's is torch."""
        return OPTIMIZERS.get(self.name, ("torch",))[0].partition(":")[0].partition(".")[0]

    def peak(self, train_type: str) -> float:
        """--learning_rate, or the default of the kind of training."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if train_type == "lora" else 1e-5

    def check(self, *, train_type: str, slicer: str | None) -> None:
        package = self.package
        flag = f"--{'optim' if self.name == self.optim else 'optimizer'} {self.name}"
        if package in INSTALL:
            require_package(package, flag=flag, install=INSTALL[package])
        whole = package == "bitsandbytes" or self.name == "adafactor"
        if slicer and slicer.startswith("--deepspeed"):  # which sees flat slices of many weights at once
            whole = whole or package == "schedulefree" or self.name == "muon"
        if slicer and whole:
            raise ConfigError(
                f"{flag} with {slicer} is not supported: its state cannot be sliced like the weights",
                hint=f"use adamw_torch, or leave {slicer} out",
            )
        if package == "schedulefree" and self.lr_scheduler_type not in LEVEL:
            raise ConfigError(
                f"{flag} has no decay, so --lr_scheduler_type {self.lr_scheduler_type} would harm it",
                hint="add --lr_scheduler_type constant_with_warmup",
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ConfigError(
                "--lr_scheduler_type constant has no warm-up",
                hint="say constant_with_warmup, or leave --warmup_ratio and --warmup_steps out",
            )
        if self.lr_scheduler_kwargs and self.lr_scheduler_type in LEVEL:
            raise ConfigError(f"--lr_scheduler_kwargs: {self.lr_scheduler_type} has no settings")
        if self.lr_scheduler_type in LEVEL or "min_lr" in self.lr_scheduler_type:
            why = f"with --lr_scheduler_type {self.lr_scheduler_type}"
            refuse(self, ("min_lr",), why, hint="leave it out, or say cosine or linear")
        if self.min_lr > self.peak(train_type):
            raise ConfigError(f"--min_lr {self.min_lr:g} is above --learning_rate {self.peak(train_type):g}")
        if self.optimizer == "lorap" and self.lorap_lr_ratio is None:
            raise ConfigError("--optimizer lorap needs --lorap_lr_ratio", hint="16 is the usual ratio")
        if train_type == "full":
            refuse(self, ("lorap_lr_ratio",), "with --train_type full", hint="leave it out, or use lora")
