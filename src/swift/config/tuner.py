"""Which weights are trained."""

from dataclasses import dataclass

from swift.config.option import option


@dataclass(frozen=True, kw_only=True, slots=True)
class TunerConfig:
    train_type: str = option("lora", help="train adapters or all weights", choices=("lora", "full"))
    lora_rank: int = option(8, help="rank of the adapters", range=(1, None))
    lora_alpha: float = option(
        32, help="adapter scale: its output is multiplied by alpha / rank", range=(0, None)
    )
    lora_dropout: float = option(0.05, help="dropout before the adapters", range=(0, 1))
    target_modules: tuple[str, ...] = option(
        ("all-linear",), help="modules that get an adapter: all-linear, or names of modules"
    )
