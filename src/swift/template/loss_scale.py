"""Which parts of the assistant's turns are trained, and how strongly (`--loss_scale`)."""

import re
from collections.abc import Sequence

from swift.template.types import Message, Span

_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")


def turn_weights(messages: Sequence[Message], loss_scale: str) -> list[float]:
    """One weight per assistant message. A message's own "loss" or "loss_scale" wins over the flag."""
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    only_last_round = "last_round" in loss_scale.split("+")
    weights = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if "loss" in message and not message["loss"]:
            weights.append(0.0)
        elif "loss_scale" in message:
            weights.append(float(message["loss_scale"]))
        elif "loss" in message:
            weights.append(1.0)
        else:
            weights.append(0.0 if only_last_round and i < last_user else 1.0)
    return weights


def weigh_spans(
    text: str, turns: Sequence[tuple[int, int]], weights: Sequence[float], loss_scale: str
) -> tuple[Span, ...]:
    """Spans of the turns with a weight above 0, without the parts that `loss_scale` leaves out."""
    names = loss_scale.split("+")
    if "all" in names:
        return (Span(0, len(text), 1.0),)
    spans = []
    for (start, end), weight in zip(turns, weights, strict=True):
        if weight <= 0 or start >= end:
            continue
        if "ignore_empty_think" in names:
            spans += _without_empty_think(text, start, end, weight)
        else:
            spans.append(Span(start, end, weight))
    return tuple(spans)


def _without_empty_think(text: str, start: int, end: int, weight: float) -> list[Span]:
    spans = []
    for match in _EMPTY_THINK.finditer(text, start, end):
        if match.start() > start:
            spans.append(Span(start, match.start(), weight))
        start = match.end()
    if start < end:
        spans.append(Span(start, end, weight))
    return spans
