"""Runs a chat template.

Owns: one call from messages to text, with and without the template's own generation markers. Not here: where
the assistant's words stand in that text (turns.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from jinja2 import Template
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from swift.template.types import Message, RenderError

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Some templates print the date of the day. Encoded rows are a function of data and flags alone (a run resumed
# tomorrow must see the same tokens), so every day is the one that Llama 3 falls back to without a clock.
RENDER_DATE = date(2024, 7, 26)


_DICT_METHODS = frozenset(dir(dict))
# Attributes that the sandbox allows after a long look, and that are read for every message.
_HARMLESS = {
    str: frozenset(("startswith", "endswith", "split", "strip", "lstrip", "rstrip")),
    LoopContext: frozenset(("first", "last", "index", "index0")),
}


class _Sandbox(ImmutableSandboxedEnvironment):
    """The same rules, with a short cut for `message.role` and the like, where most of the time goes."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _DICT_METHODS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if attribute in _HARMLESS.get(kind, ()):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


@lru_cache
def _compile(source: str) -> Template:
    """The template with transformers' own filters, functions and tags: the text is what others render."""
    theirs = _compile_jinja_template(source).environment
    ours = _Sandbox(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    ours.filters.update(theirs.filters)
    ours.globals.update(theirs.globals, strftime_now=RENDER_DATE.strftime)
    return ours.from_string(source)


@dataclass(frozen=True, slots=True)
class Renderer:
    """A template with its constants. Holds text only, so that it can be sent to another process."""

    source: str
    variables: Mapping[str, Any]

    @property
    def has_markers(self) -> bool:
        return _MARKERS.search(self.source) is not None

    def text(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            return _compile(self.source).render(**self._context(messages, tools, add_generation_prompt))
        except Exception as error:  # a template is a stranger's program: whatever it raises is about this row
            raise RenderError(f"the chat template refuses it: {error}") from error

    def marked(
        self, messages: Sequence[Message], tools: list[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [start, end) of every `{% generation %}` block in it."""
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        template = _compile(self.source)
        try:
            with template.environment.activate_tracker(blocks, spans):
                # The tracker measures positions in `blocks`, so it has to grow while the template runs.
                for block in template.generate(**self._context(messages, tools, False)):
                    blocks.append(block)
        except Exception as error:
            raise RenderError(f"the chat template refuses it: {error}") from error
        return "".join(blocks), spans

    def _context(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool) -> dict[str, Any]:
        return {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
            **self.variables,
        }
