"""What goes to a hub: the result of an export, or checkpoints while a training goes on."""

from dataclasses import dataclass, fields

from swift.config.option import ConfigError, option


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishOptions:
    push_to_hub: bool = option(
        False,
        help="upload the checkpoints of a training; of an export its result, or else what it starts from",
    )
    hub_model_id: str | None = option(None, help="where on the hub: OWNER/NAME, or NAME for one of your own")
    hub_private_repo: bool = option(False, help="a repository that is made anew is private")

    def check(self) -> None:
        """Raises ConfigError for what has no effect, or lacks a name."""
        if self.push_to_hub and not self.hub_model_id:
            raise ConfigError("--push_to_hub needs --hub_model_id", hint="OWNER/NAME on the hub")
        for field in () if self.push_to_hub else fields(self):
            if getattr(self, field.name) != field.default:
                raise ConfigError(f"--{field.name} has no effect without --push_to_hub true")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultPublishing(PublishOptions):
    commit_message: str = option("update files", help="what the hub shows beside the files")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPublishing(PublishOptions):
    hub_strategy: str = option(
        "every_save", help="upload after every save, or the last checkpoint at the end",
        choices=("every_save", "end"),
    )  # fmt: skip
    hub_always_push: bool = option(
        False, help="upload every checkpoint; no = of those saved while an upload goes on, the newest"
    )
