"""How often a conversation goes on after an answer, and who says with what."""

from dataclasses import dataclass, fields

from swift.config.option import ConfigError, default_of, option


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnConfig:
    multi_turn_scheduler: str | None = option(
        None,
        "what continues conversations: gym_scheduler, math_tip_trick, a name from --external_plugins or "
        "file.py:name; none = one answer each",
    )
    max_turns: int | None = option(
        None, "answers in a conversation; none = as many as the scheduler wants", min=1
    )
    completion_length_limit_scope: str = option(
        "per_round", "what --max_completion_length is for: each answer, or all of a conversation",
        choices=("per_round", "total"),
    )  # fmt: skip
    use_gym_env: bool = option(
        False, "let environments continue conversations; what they give is a reward, gym_reward"
    )
    gym_env: str | None = option(
        None, "environment of rows without a column env_config, from --external_plugins"
    )

    @property
    def scheduler(self) -> str | None:
        """Name of the scheduler, if there is one."""
        return self.multi_turn_scheduler or ("gym_scheduler" if self.use_gym_env else None)

    @property
    def changed(self) -> list[str]:
        """Flags that are not at their defaults."""
        return [f.name for f in fields(self) if getattr(self, f.name) != default_of(f)]

    def check(self) -> None:
        for name in ("max_turns", "completion_length_limit_scope"):
            if name in self.changed and self.scheduler is None:
                raise ConfigError(
                    f"--{name} has no effect without --multi_turn_scheduler or --use_gym_env true"
                )
        if self.gym_env is not None and not self.use_gym_env:
            raise ConfigError("--gym_env has no effect without --use_gym_env true")
