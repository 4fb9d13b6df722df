"""How messages become tokens."""

from dataclasses import dataclass

from swift.config.option import option

LOSS_SCALES = ("default", "last_round", "all", "ignore_empty_think", "last_round+ignore_empty_think")


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateConfig:
    system: str | None = option(
        None, help="system prompt (text or a .txt file) for rows that have none of their own"
    )
    max_length: int | None = option(
        None, help="longest row; none = the model's context", unit="tokens", range=(1, None)
    )
    truncation_strategy: str = option(
        "delete", help="what becomes of a longer row", choices=("delete", "left", "right")
    )
    loss_scale: str = option(
        "default", help="which tokens are trained, and how strongly", choices=LOSS_SCALES
    )
    enable_thinking: bool | None = option(
        None, help="handed to the chat template; none = the template's default"
    )
    response_prefix: str | None = option(None, help="text that every generated answer starts with")
