"""How often a conversation goes on after an answer, and who says with what."""

from dataclasses import dataclass

from swift.config.option import option, refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnConfig:
    multi_turn_scheduler: str | None = option(
        None,
        "what continues conversations: gym_scheduler, math_tip_trick, a name from --external_plugins or "
        "file.py:name; none = one answer each",
    )
    max_turns: int | None = option(None, "answers in a conversation; none = as the scheduler wants", min=1)
    completion_length_limit_scope: str = option(
        "per_round", "what --max_completion_length is for: each answer, or all of a conversation",
        choices=("per_round", "total"),
    )  # fmt: skip
    use_gym_env: bool = option(False, "let environments continue conversations, and reward them (gym_reward)")
    gym_env: str | None = option(None, "environment of rows without env_config, from --external_plugins")

    @property
    def scheduler(self) -> str | None:
        """Name of the scheduler, if there is one."""
        return self.multi_turn_scheduler or ("gym_scheduler" if self.use_gym_env else None)

    def check(self) -> None:
        if self.scheduler is None:
            names = ("max_turns", "completion_length_limit_scope")
            refuse(self, names, "without --multi_turn_scheduler or --use_gym_env true")
        if not self.use_gym_env:
            refuse(self, ("gym_env",), "without --use_gym_env true")
