"""What a model wrote, in OpenAI's form: thoughts, words and calls of tools told apart, whole or as they come.

Owns: the parts of one answer and the bodies of responses. Not here: where tokens come from (service.py), HTTP
(server.py). A whole answer goes through the same code as a stream, in one piece: both say the same.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from swift.rollout.detokenize import BROKEN, overlap
from swift.template.agents import AgentFormat

THINK, THOUGHT = "<think>", "</think>"
NAME = "zqname"


@dataclass(frozen=True, slots=True)
class Told:
    """A generated token, and how likely it and the likeliest ones were at its place."""

    token_id: int
    logp: float
    top_logps: dict[int, float] | None


@dataclass(slots=True)
class Delta:
    """A piece of an answer. `reason` is why it ended, with its last piece."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Told] = field(default_factory=list)
    reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls or self.reason)

    def add(self, other: "Delta") -> None:
        """Takes over a piece that comes next."""
        self.reasoning += other.reasoning
        self.content += other.content
        self.calls += other.calls
        self.tokens += other.tokens
        self.reason = other.reason

    def end(self, reason: str) -> None:
        self.reason = "tool_calls" if self.calls else reason


@dataclass(kw_only=True)
class AnswerSplitter:
    """Tells the parts of one answer apart, whatever pieces it comes in.

    `thinks`: the prompt has opened the block of thoughts already. `form`: how calls of `tools` are written,
    None = there are none. A call is told whole, once the answer has ended; one that cannot be read is words.
    `single`: only the first call is told. `plain`: all is words.
    """

    plain: bool = False
    thinks: bool = False
    form: AgentFormat | None = None
    tools: Sequence[dict[str, Any]] = ()
    single: bool = False

    def __post_init__(self) -> None:
        functions = [tool["function"] for tool in self.tools]
        self.schemas = {function["name"]: function.get("parameters") for function in functions}
        self.mark = self.form.calls([(NAME, {})]).split(NAME)[0].split("\n")[0] if self.form else ""
        self.mode = "content" if self.plain else "think" if self.thinks else "start"
        self.pending = ""
        self.is_bare = self.thinks  # nothing of this part is out: spaces at its beginning belong to no one

    def push(self, text: str, *, final: bool = False) -> Delta:
        """The piece that `text` completes."""
        self.pending += text
        delta = Delta()
        if self.mode == "start":
            head = self.pending.lstrip()
            if head.startswith(THINK):
                self.mode, self.pending, self.is_bare = "think", head.removeprefix(THINK), True
            elif final or not THINK.startswith(head):
                self.mode = "content"
        if self.mode == "think":
            before, closed, after = self.pending.partition(THOUGHT)
            held = overlap(before, THOUGHT) if not (closed or final) else 0
            delta.reasoning = self._release(before, held)
            if closed:
                self.mode, self.pending, self.is_bare = "content", after, True
            elif final:
                self.pending = ""
        if self.mode == "content":
            before, found, _ = self.pending.partition(self.mark) if self.mark else (self.pending, "", "")
            if found:
                self.mode = "calls"
                delta.content = self._release(before, 0)
            elif self.mark or self.is_bare:
                delta.content = self._release(before, 0 if final else overlap(before, self.mark))
            else:
                delta.content, self.pending = before, ""
        if final:
            self._finish(delta)
        return delta

    def _release(self, text: str, held: int) -> str:
        """What of `text`, how `pending` begins, may go out: no space at its ends, nor the last `held`."""
        start = len(text) - len(text.lstrip()) if self.is_bare else 0
        end = len(text[: len(text) - held].rstrip())
        if end <= start:
            self.pending = self.pending[start:]
            return ""
        self.is_bare = False
        self.pending = self.pending[end:]
        return text[start:end]

    def _finish(self, delta: Delta) -> None:
        """Calls, or what was held back because it might have become some."""
        if self.mode == "calls" and self.form:
            try:
                calls = self.form.parse(self.pending)
            except (ValueError, KeyError, TypeError):
                calls = []
            told = calls[:1] if self.single else calls
            delta.calls = [self._describe(i, *call) for i, call in enumerate(told)]
        if not delta.calls:
            delta.content += self.pending.lstrip() if self.is_bare else self.pending
        self.pending = ""

    def _describe(self, index: int, name: str, arguments: Any) -> dict[str, Any]:
        properties = (self.schemas.get(name) or {}).get("properties") or {}
        if self.form and not self.form.typed:  # this form writes every value as text
            arguments = {key: _typed(value, properties.get(key) or {}) for key, value in arguments.items()}
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {
            "index": index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": function,
        }


def _typed(value: str, schema: dict[str, Any]) -> Any:
    """The value that a text stands for where the tool wants something else than text."""
    if schema.get("type", "string") == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


@dataclass(frozen=True, slots=True)
class Writer:
    """The bodies of one response."""

    id: str
    model: str
    created: int  # seconds since 1970
    chat: bool
    tokenizer: PreTrainedTokenizerBase
    logprobs: bool
    token_ids: bool

    def whole(self, answers: Sequence[Delta], usage: dict[str, int]) -> dict[str, Any]:
        """The response to a request that does not stream."""
        choices = []
        for index, answer in enumerate(answers):
            choice = self._choice(index, answer)
            if self.chat:
                calls = [{k: v for k, v in call.items() if k != "index"} for call in answer.calls]
                message: dict[str, Any] = {"role": "assistant", "content": answer.content}
                message |= {"reasoning_content": answer.reasoning} if answer.reasoning else {}
                if calls:
                    message |= {"content": answer.content or None, "tool_calls": calls}
                choice["message"] = message
            choices.append(choice)
        return {**self._head(""), "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of an answer in a chat."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return {**self._head(), "choices": [choice]}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        choice = self._choice(index, delta)
        if self.chat:
            parts = {
                "reasoning_content": delta.reasoning,
                "content": delta.content,
                "tool_calls": delta.calls,
            }
            choice["delta"] = {name: part for name, part in parts.items() if part}
        return {**self._head(), "choices": [choice]}

    def closing(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream whose request wants to know what it used."""
        return {**self._head(), "choices": [], "usage": usage}

    def _head(self, part: str = ".chunk") -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": delta.reason, "logprobs": None}
        if not self.chat:
            choice["text"] = delta.content
        if self.token_ids:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
        if self.logprobs and delta.tokens:
            tell = partial(describe_logprobs, self.tokenizer) if self.chat else self._text_logprobs
            choice["logprobs"] = tell(delta.tokens)
        return choice

    def _text_logprobs(self, tokens: Sequence[Told]) -> dict[str, Any]:
        """Without text_offset: tokens that are part of a character have no place in the text."""
        return {
            "tokens": [spell(self.tokenizer, token.token_id)[0] for token in tokens],
            "token_logprobs": [token.logp for token in tokens],
            "top_logprobs": [
                {spell(self.tokenizer, id_)[0]: logp for id_, logp in (token.top_logps or {}).items()}
                for token in tokens
            ],
        }


def spell(tokenizer: PreTrainedTokenizerBase, token_id: int) -> tuple[str, list[int] | None]:
    """A token's text and bytes; that of a part of a character as the vocabulary spells it, without bytes."""
    text: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return (
        (tokenizer.convert_ids_to_tokens(token_id), None) if BROKEN in text else (text, list(text.encode()))
    )


def describe_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Told]) -> dict[str, Any]:
    """Log-probabilities of an answer in a chat."""

    def describe(token_id: int, logp: float) -> dict[str, Any]:
        text, told = spell(tokenizer, token_id)
        return {"token": text, "logprob": logp, "bytes": told}

    content = [
        describe(token.token_id, token.logp)
        | {"top_logprobs": [describe(*pair) for pair in (token.top_logps or {}).items()]}
        for token in tokens
    ]
    return {"content": content}
