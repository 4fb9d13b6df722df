"""What goes to a hub: the result of an export, or checkpoints while a training goes on."""

from dataclasses import dataclass

from swift.config.option import ConfigError, changed, option, refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishOptions:
    push_to_hub: bool = option(
        False,
        "upload the checkpoints of a training; of an export its result, or else what it starts from",
    )
    hub_model_id: str | None = option(None, "where on the hub: OWNER/NAME, or NAME for one of your own")
    hub_private_repo: bool = option(False, "a repository that is made anew is private")

    def check(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise ConfigError("--push_to_hub needs --hub_model_id", hint="OWNER/NAME on the hub")
        if not self.push_to_hub:
            refuse(self, changed(self), "without --push_to_hub true")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultPublishing(PublishOptions):
    commit_message: str = option("update files", "what the hub shows beside the files")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPublishing(PublishOptions):
    hub_strategy: str = option(
        "every_save", "upload after every save, or the last checkpoint at the end",
        choices=("every_save", "end"),
    )  # fmt: skip
    hub_always_push: bool = option(
        False, "upload every checkpoint; no = of those saved while an upload goes on, the newest"
    )
