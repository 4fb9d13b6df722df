"""Records that pass between rendering and tokenising. Not here: how they are made (chat.py, tokenize.py)."""

from dataclasses import dataclass
from typing import Any

# {"role": "system|user|assistant|tool", "content": str, ["tool_calls"], ["loss": bool], ["loss_scale":
# float]}
Message = dict[str, Any]


class RenderError(ValueError):
    """A row that cannot become text; the message is a short reason, the same for the same fault."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a rendered text that are trained, with the weight of their loss."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model reads it. Spans are ascending, do not overlap and have weights above 0."""

    text: str
    spans: tuple[Span, ...]
