"""How messages become tokens."""

from dataclasses import dataclass

from swift.config.option import ConfigError, option

AGENT_TEMPLATES = ("hermes", "qwen3_coder", "glm4_5", "llama3", "react_en", "react_zh")


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateConfig:
    use_chat_template: bool = option(
        True, "write conversations as the model's chat template does; no = their bare text, ended by eos"
    )
    system: str | None = option(None, "system prompt (text or a .txt file) for rows that have none")
    max_length: int | None = option(None, "longest row; none = the model's context", unit="tokens", min=1)
    truncation_strategy: str = option(
        "delete",
        "what becomes of a longer row; split = several rows of it, for plain text",
        choices=("delete", "left", "right", "split"),
    )
    loss_scale: str = option(
        "default",
        "which tokens are trained, and how strongly: default, last_round or all, and with + "
        "ignore_empty_think, hermes, react, qwen, alpha_umi, agentflan or a plugin's own",
    )
    is_binary_loss_scale: bool = option(False, "train every token that has a weight above 0 with weight 1")
    agent_template: str | None = option(
        None,
        "how tools and their calls are written; none = as the model's own template does, "
        "or hermes where that shows no tools",
        choices=AGENT_TEMPLATES,
    )
    enable_thinking: bool | None = option(None, "handed to the chat template; none = the template's default")
    response_prefix: str | None = option(None, "text that every generated answer starts with")

    def check(self) -> None:
        if self.truncation_strategy == "split" and self.use_chat_template:
            raise ConfigError(
                "--truncation_strategy split would cut conversations apart: it is for plain text",
                hint="use swift pt or --use_chat_template false, or another strategy",
            )
