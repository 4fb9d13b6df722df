"""Which weights are trained."""

import re
from dataclasses import dataclass

from swift.config.option import ConfigError, option

STARTS = ("true", "false", "gaussian", "orthogonal", "pissa", "olora")
ONLY_LORA = (
    "adapters", "use_rslora", "use_dora", "target_regex", "target_parameters", "modules_to_save",
    "lora_dtype",
)  # fmt: skip
ONLY_FULL = (
    "freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio",
    "trainable_parameters", "trainable_parameters_regex",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TunerConfig:
    train_type: str = option("lora", help="train adapters or all weights", choices=("lora", "full"))
    adapters: tuple[str, ...] = option(
        (), help="train on from this checkpoint's adapters; rank, alpha, targets are then theirs"
    )
    lora_rank: int = option(8, help="rank of the adapters", range=(1, None))
    lora_alpha: float = option(
        32, help="adapter scale: its output is multiplied by alpha / rank", range=(0, None)
    )
    lora_dropout: float = option(0.05, help="dropout before the adapters", range=(0, 1))
    target_modules: tuple[str, ...] = option(
        ("all-linear",), help="modules that get an adapter: all-linear, all-embedding, or names of modules"
    )
    target_regex: str | None = option(
        None, help="modules whose whole name matches get an adapter, instead of --target_modules"
    )
    target_parameters: tuple[str, ...] = option(
        (), help="ends of names of weights that get an adapter, such as experts.down_proj"
    )
    modules_to_save: tuple[str, ...] = option(
        (), help="modules trained whole beside the adapters: names, all-embedding, all-norm"
    )
    use_rslora: bool = option(False, help="scale by alpha / sqrt(rank) instead of alpha / rank")
    use_dora: bool = option(False, help="train the length of each weight column apart (DoRA)")
    init_weights: str = option(
        "true", help=f"where adapters start: {', '.join(STARTS)} or pissa_niter_N; true = as the model itself"
    )
    lora_bias: str = option("none", help="biases that are trained", choices=("none", "all"))
    lora_dtype: str | None = option(
        None,
        help="dtype of the adapters; none = float32 beside half-precision weights",
        choices=("float16", "bfloat16", "float32"),
    )
    freeze_parameters: tuple[str, ...] = option((), help="beginnings of names that full training freezes")
    freeze_parameters_regex: str | None = option(
        None, help="full training freezes parameters whose name has a match"
    )
    freeze_parameters_ratio: float = option(
        0.0, help="share of all weights, from the input on, that full training freezes", range=(0, 1)
    )
    trainable_parameters: tuple[str, ...] = option(
        (), help="beginnings of names that are trained although frozen by the flags above"
    )
    trainable_parameters_regex: str | None = option(
        None, help="parameters whose name has a match are trained although frozen"
    )

    def check(self) -> None:
        """Raises ConfigError for a flag that would do nothing, or a text that is no pattern."""
        other = ONLY_FULL if self.train_type == "lora" else ONLY_LORA
        for name in other:
            if getattr(self, name):
                raise ConfigError(
                    f"--{name} has no effect with --train_type {self.train_type}",
                    hint="merge adapters first: swift export --merge_lora true"
                    if name == "adapters"
                    else None,
                )
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
