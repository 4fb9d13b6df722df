"""Which weights are trained."""

import re
from dataclasses import dataclass

from swift.config.option import ConfigError, option, refuse

STARTS = ("true", "false", "gaussian", "orthogonal", "pissa", "olora")
ONLY_LORA = (
    "use_rslora", "use_dora", "target_regex", "target_parameters", "modules_to_save", "lora_dtype",
)  # fmt: skip
ONLY_FULL = (
    "freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio",
    "trainable_parameters", "trainable_parameters_regex",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TunerConfig:
    train_type: str = option("lora", "train adapters or all weights", choices=("lora", "full"))
    adapters: tuple[str, ...] = option((), "train on these adapters, with their rank, alpha, targets")
    lora_rank: int = option(8, "rank of the adapters", min=1)
    lora_alpha: float = option(32, "adapter scale: its output is multiplied by alpha / rank", min=0)
    lora_dropout: float = option(0.05, "dropout before the adapters", range=(0, 1))
    target_modules: tuple[str, ...] = option(
        ("all-linear",), "modules that get an adapter: all-linear, all-embedding, or names of modules"
    )
    target_regex: str | None = option(None, "modules whose whole name matches, instead of --target_modules")
    target_parameters: tuple[str, ...] = option((), "weights that get an adapter, by the end of their name")
    modules_to_save: tuple[str, ...] = option(
        (), "modules trained whole beside the adapters: names, all-embedding, all-norm"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    use_dora: bool = option(False, "train the length of each weight column apart (DoRA)")
    init_weights: str = option(
        "true", f"where adapters start: {', '.join(STARTS)} or pissa_niter_N; true = as the model itself"
    )
    lora_bias: str = option("none", "biases that are trained", choices=("none", "all"))
    lora_dtype: str | None = option(
        None,
        "dtype of the adapters; none = float32 beside half-precision weights",
        choices=("float16", "bfloat16", "float32"),
    )
    freeze_parameters: tuple[str, ...] = option((), "beginnings of names that full training freezes")
    freeze_parameters_regex: str | None = option(None, "full training freezes parameters with a match")
    freeze_parameters_ratio: float = option(
        0.0, "share of all weights, from the input on, that full training freezes", range=(0, 1)
    )
    trainable_parameters: tuple[str, ...] = option(
        (), "beginnings of names that are trained although frozen by the flags above"
    )
    trainable_parameters_regex: str | None = option(None, "parameters with a match are trained all the same")

    def check(self) -> None:
        without = f"with --train_type {self.train_type}"
        if self.train_type == "full":
            refuse(self, ("adapters",), without, hint="merge adapters first: swift export --merge_lora true")
        refuse(self, ONLY_FULL if self.train_type == "lora" else ONLY_LORA, without)
        for name in ("target_regex", "freeze_parameters_regex", "trainable_parameters_regex"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise ConfigError(f"--{name} is no regular expression: {error}") from error
        if self.init_weights not in STARTS and not re.fullmatch(r"pissa_niter_\d+", self.init_weights):
            raise ConfigError(
                f"--init_weights {self.init_weights} is not known",
                hint=f"one of {', '.join(STARTS)}, pissa_niter_N",
            )
        if len(self.adapters) > 1:
            raise ConfigError(
                f"--adapters names {len(self.adapters)} checkpoints; training goes on from one",
                hint="merge the others first: swift export --merge_lora true",
            )
