"""The tokenizer's own chat template with our settings: the normal renderer for every model.

Owns: the system prompt, the prompt for generation, the text for training with its spans, and the tokens that
end a turn. Not here: tokens of a text (tokenize.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.config.template import TemplateConfig
from swift.template.agents import check_calls, choose_agent, split_turns, with_agent
from swift.template.jinja import Renderer
from swift.template.loss_scale import build_weights
from swift.template.shape import learn_shape
from swift.template.specs import chat_spec, with_defaults
from swift.template.turns import find_turns
from swift.template.types import Message, Rendered, RenderError

_CHATML_END = "<|im_end|>"


class ChatTemplate:
    """Messages to text, the same way for training and for inference.

    `source` is the template as Jinja: the tokenizer's own, or ChatML for a tokenizer that has none (a saved
    tokenizer should then carry it). `calls` is the form in which calls of tools can be read back, None =
    unknown. Can be pickled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.system = _read_system(config.system)
        self.response_prefix = _unescape(config.response_prefix or "")
        self.source = _choose_source(tokenizer, config.use_chat_template)
        variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if config.enable_thinking is not None:
            variables["enable_thinking"] = config.enable_thinking
        self._renderer = Renderer(self.source, variables)
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        specials |= {tokenizer.eos_token} if tokenizer.eos_token else set()
        self._shape = learn_shape(self._renderer, specials, tokenizer.eos_token)
        ends = filter(None, (self._shape.end_of_turn, tokenizer.eos_token))
        self.stop_token_ids = tuple(dict.fromkeys(map(tokenizer.convert_tokens_to_ids, ends)))
        self._weights = build_weights(config.loss_scale, binary=config.is_binary_loss_scale)
        self._agent, self.calls = choose_agent(self._renderer, config.agent_template)

    def prompt(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None, response_prefix: str = ""
    ) -> str:
        """The text to continue: conversation, assistant's header, prefix (default: --response_prefix)."""
        prepared = self._prepare(messages, tools)
        begun = ""
        if messages and messages[-1]["role"] == "tool" and prepared[-1]["role"] == "assistant":
            begun = prepared.pop()["content"]  # the answer goes on after the tool's result
        shown = None if self._agent else tools
        text = self._renderer.text(prepared, shown, add_generation_prompt=True) + begun
        return text + (_unescape(response_prefix) or self.response_prefix)

    def render(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> Rendered:
        """The text to train on, with the spans of the assistant's turns weighed by --loss_scale.

        Raises RenderError. No spans are returned where nothing of the row is trained.
        """
        prepared = self._prepare(messages, tools)
        text, turns = find_turns(self._renderer, self._shape, prepared, None if self._agent else tools)
        turns = split_turns(text, turns, prepared)
        if self.calls:
            check_calls(self.calls, messages, text, turns)
        return Rendered(text, self._weights.spans(text, turns, messages, self._shape.end_of_turn))

    def deployed(self) -> str:
        """`source` with the system prompt and the other settings in it, for programs that know none of ours.

        It gives the prompts that `prompt` gives, up to --response_prefix.
        """
        settings = {"system": self.system or "", "enable_thinking": self.config.enable_thinking}
        full = with_defaults(self.source, **settings, folds_system=self._shape.folds_system)
        user, answer = {"role": "user", "content": "zquser"}, {"role": "assistant", "content": "zqanswer"}
        chats = ([user], [user, answer, user], [{"role": "system", "content": "zqsystem"}, user])
        expected = [self.prompt(chat).removesuffix(self.response_prefix) for chat in chats]
        known = {k: v for k, v in self._renderer.variables.items() if k != "enable_thinking"}
        for source in (self.source, full):  # the first where an export made it
            try:
                rendered = [Renderer(source, known).text(chat, add_generation_prompt=True) for chat in chats]
            except RenderError:  # no system messages here, which `full` takes care of
                continue
            if rendered == expected:
                return source
        raise AssertionError((full, expected))

    def _prepare(self, messages: Sequence[Message], tools: list[Any] | None) -> list[Message]:
        """Adds our system prompt to a conversation without one, in the form that the template can show."""
        prepared = list(messages)
        if self.system and (not prepared or prepared[0]["role"] != "system"):
            prepared.insert(0, {"role": "system", "content": self.system})
        if self._agent and (tools or any(m["role"] == "tool" or "tool_calls" in m for m in prepared)):
            prepared = with_agent(self._agent, prepared, tools, self._shape.default_system)
        if self._shape.folds_system and len(prepared) > 1 and prepared[0]["role"] == "system":
            system, first, *rest = prepared
            if first["role"] == "user":
                words = "\n\n".join(part for part in (system["content"], first["content"]) if part)
                prepared = [{**first, "content": words}, *rest]
        return prepared


def _read_system(system: str | None) -> str | None:
    """--system as text: the content of a .txt file, or the value itself with its written-out line ends."""
    if system is None:
        return None
    if not system.endswith(".txt"):
        return _unescape(system)
    try:
        return Path(system).expanduser().read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        raise ConfigError(f"--system {system}: {error.strerror or error}") from error


def _unescape(text: str) -> str:
    """A line end typed as backslash-n, as shells pass it on."""
    return text.replace("\\n", "\n")


def _choose_source(tokenizer: PreTrainedTokenizerBase, use_chat_template: bool) -> str:
    """The tokenizer's own template; plain text where none is wanted; else ChatML.

    ChatML's turns end with eos where the vocabulary has no token of its name.
    """
    if use_chat_template and tokenizer.chat_template:
        return tokenizer.get_chat_template()
    ids = tokenizer("a").input_ids
    starts_with_bos = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    opening = tokenizer.bos_token if starts_with_bos else ""
    if not use_chat_template:
        return chat_spec("plain_text.jinja", opening=opening, end=tokenizer.eos_token or "")
    known = any(token.content == _CHATML_END for token in tokenizer.added_tokens_decoder.values())
    end = _CHATML_END if known or not tokenizer.eos_token else tokenizer.eos_token
    return chat_spec("chatml.jinja", opening=opening, end=end)
