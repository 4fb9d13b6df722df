"""What answers are worth: reward functions, reward models, and their settings."""

from dataclasses import dataclass

from swift.config.option import ConfigError, changed, option, require_package

# flags that only these shipped rewards read
SETTINGS_OF = {"cosine": "cosine", "repetition": "repetition", "soft": "soft_overlong"}
REWARDED = ("grpo", "ppo")  # methods
SHIPPED = ("accuracy", "format", "react_format", "cosine", "repetition", "soft_overlong", "toolbench", "math")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    reward_funcs: tuple[str, ...] = option(
        (), f"rewards, summed: {', '.join(SHIPPED)}, names from --external_plugins, or file.py:name"
    )
    reward_weights: tuple[float, ...] | None = option(
        None, "weight of each of --reward_funcs, then of each --reward_model; none = 1 each"
    )
    reward_model: tuple[str, ...] = option((), "models with a score head, which judge whole conversations")
    reward_model_plugin: tuple[str, ...] = option(
        (), "what turns each --reward_model into a number, from --external_plugins; none = its score"
    )
    reward_timeout: float = option(300.0, "longest time for one reward and batch", unit="seconds", min=0.01)
    cosine_max_len: int | None = option(
        None, "cosine: length with the last value; none = --max_completion_length", unit="tokens",
        min=1,
    )  # fmt: skip
    cosine_min_len_value_correct: float = option(1.0, "cosine: value of a short correct answer")
    cosine_max_len_value_correct: float = option(0.5, "cosine: value of a long correct answer")
    cosine_min_len_value_wrong: float = option(-0.5, "cosine: value of a short wrong answer")
    cosine_max_len_value_wrong: float = option(0.0, "cosine: value of a long wrong answer")
    repetition_n_grams: int = option(3, "repetition: words that are compared together", min=1)
    repetition_max_penalty: float = option(
        -1.0, "repetition: value of an answer that only repeats itself", range=(None, 0)
    )
    soft_max_length: int | None = option(
        None, "soft_overlong: length with value -1; none = --max_completion_length", unit="tokens",
        min=1,
    )  # fmt: skip
    soft_cache_length: int | None = option(
        None, "soft_overlong: tokens before that over which it falls from 0", unit="tokens",
        min=1,
    )  # fmt: skip

    def check(self, *, max_completion_length: int, has_environment: bool = False) -> None:
        """Raises ConfigError. For methods that have rewards; names of plugins are looked up by the panel."""
        for name in changed(self):
            reader = SETTINGS_OF.get(name.split("_")[0])
            if reader and set(self.reward_funcs) <= {*SHIPPED} - {reader}:
                raise ConfigError(f"--{name} has no effect without --reward_funcs {reader}")
        count = len(self.reward_funcs) + has_environment + len(self.reward_model)
        if not count:
            raise ConfigError(
                "no reward is named", hint="--reward_funcs accuracy format, or --reward_model MODEL"
            )
        if self.reward_weights is not None and len(self.reward_weights) != count:
            raise ConfigError(
                f"--reward_weights has {len(self.reward_weights)} values for {count} rewards",
                hint="one for each of --reward_funcs, for --use_gym_env true, and for each --reward_model",
            )
        if len(self.reward_model_plugin) not in (0, 1, len(self.reward_model)) or (
            self.reward_model_plugin and not self.reward_model
        ):
            raise ConfigError(
                f"--reward_model_plugin has {len(self.reward_model_plugin)} values for "
                f"{len(self.reward_model)} in --reward_model",
                hint="give one for all, or one for each",
            )
        for name in ("accuracy", "cosine", "math"):
            if name in self.reward_funcs:
                require_package("math_verify", flag=f"--reward_funcs {name}", install="swiftune[rewards]")
        if "soft_overlong" in self.reward_funcs:
            longest = self.soft_max_length or max_completion_length
            if self.soft_cache_length is None:
                raise ConfigError(
                    "--reward_funcs soft_overlong needs --soft_cache_length",
                    hint=f"tokens before {longest} over which the value falls from 0 to -1",
                )
            if self.soft_cache_length > longest:
                raise ConfigError(
                    f"--soft_cache_length {self.soft_cache_length} is above --soft_max_length {longest}"
                )
