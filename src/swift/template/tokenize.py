"""Rendered text to token ids with labels.

Owns: one tokenizer call for many rows, labels from character spans, truncation. Not here: words that are
encoded once (words.py), batches (data/collate.py), which also shift the labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Encoding

from swift.config.option import ConfigError
from swift.template.chat import ChatTemplate
from swift.template.types import Message, Rendered, RenderError
from swift.template.words import WordMemory, learn_words

IGNORED = -100  # as batch.IGNORED; importing that would load torch into every worker process

NO_ANSWER = "no assistant turn"
NOTHING_TRAINED = "no trained token"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row. L = its tokens."""

    input_ids: np.ndarray  # [L] int32
    labels: np.ndarray  # [L] int32, not shifted; IGNORED = not trained, as token 0: nothing predicts it
    loss_scale: np.ndarray | None  # [L] float32; none = 1 everywhere

    def cut(self, first: int, end: int) -> "Encoded":
        """Tokens [first, end), without copying them."""
        scale = None if self.loss_scale is None else self.loss_scale[first:end]
        return Encoded(self.input_ids[first:end], self.labels[first:end], scale)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used, and why: short, and the same words for the same fault."""

    reason: str
    unsupervised: bool = False  # the row itself has nothing to learn, whatever the limits


def encode_chats(
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    *,
    tools: Sequence[list[Any] | None] | None = None,
    max_length: int | None,
    truncation_strategy: str,
) -> list[Encoded | Rejected]:
    """Encodes every conversation, in order, with one call of the tokenizer for all.

    `tools`: one list per conversation. `max_length` counts tokens; `truncation_strategy` says what becomes of
    a longer row: "delete", or keep its last ("left") or first ("right") tokens; "split" leaves it whole.
    """
    backend = fast_backend(template)
    rendered = [
        _render(template, messages, tools[i] if tools is not None else None)
        for i, messages in enumerate(conversations)
    ]
    good = [row for row in rendered if isinstance(row, Rendered)]
    memory = _word_memory(template, backend)
    placed = iter(_place(backend, good) if memory is None else _place_by_words(memory, good))
    return [
        _label(row, *next(placed), max_length, truncation_strategy) if isinstance(row, Rendered) else row
        for row in rendered
    ]


def encode_prompts(
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    *,
    tools: Sequence[list[Any] | None] | None = None,
    max_length: int | None = None,
    truncation_strategy: str = "delete",
) -> list[Encoded | Rejected]:
    """As `encode_chats`, of conversations that wait for an answer: they end with the assistant's header."""
    texts: list[str | Rejected] = []
    for i, messages in enumerate(conversations):
        try:
            texts.append(template.prompt(messages, tools=tools[i] if tools is not None else None))
        except RenderError as error:
            texts.append(Rejected(str(error)))
    good = [text for text in texts if isinstance(text, str)]
    found = iter(fast_backend(template).encode_batch(good, add_special_tokens=False))
    return [
        text if isinstance(text, Rejected) else _limit(next(found).ids, max_length, truncation_strategy)
        for text in texts
    ]


def _limit(ids: list[int], max_length: int | None, truncation_strategy: str) -> Encoded | Rejected:
    """A prompt within `max_length`, none of whose tokens is trained."""
    if max_length is not None and len(ids) > max_length:
        if truncation_strategy == "delete":
            return Rejected(f"longer than --max_length {max_length}")
        ids = ids[:max_length] if truncation_strategy == "right" else ids[-max_length:]
    return Encoded(np.array(ids, dtype=np.int32), np.full(len(ids), IGNORED, dtype=np.int32), None)


# [L] ids of a row, and tokens [first, last) of each of its spans.
_Placed = tuple[np.ndarray, list[tuple[int, int]]]

_memories: WeakKeyDictionary[ChatTemplate, WordMemory | None] = WeakKeyDictionary()


def _word_memory(template: ChatTemplate, backend: Any) -> WordMemory | None:
    if template not in _memories:
        _memories[template] = learn_words(backend, _first_token, _last_token)
    return _memories[template]


def _place(backend: Any, rows: Sequence[Rendered]) -> list[_Placed]:
    # The template writes the special tokens, bos included: the tokenizer adds none.
    encodings = backend.encode_batch([row.text for row in rows], add_special_tokens=False)
    placed = []
    for row, encoding in zip(rows, encodings, strict=True):
        ranges = [token_range(encoding, row.text, span.start, span.end) for span in row.spans]
        placed.append((np.array(encoding.ids, dtype=np.int32), ranges))
    return placed


def _place_by_words(memory: WordMemory, rows: Sequence[Rendered]) -> list[_Placed]:
    """Most words come out of the memory. The same tokens and ranges as `_place`."""
    spans = [[(span.start, span.end) for span in row.spans] for row in rows]
    placed = []
    for ids, tokens in memory.encode([row.text for row in rows], spans):
        pairs = zip(tokens[::2], tokens[1::2], strict=True)
        placed.append((ids, [(first, max(first, last)) for first, last in pairs]))
    return placed


def fast_backend(template: ChatTemplate) -> Any:
    tokenizer = template.tokenizer
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the model's tokenizer ({type(tokenizer).__name__}) has no fast version, which training needs",
            hint="convert it to a tokenizer.json",
        )
    backend = tokenizer.backend_tokenizer
    # A saved tokenizer.json may carry settings of its last use.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _render(
    template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None
) -> Rendered | Rejected:
    trains_all = template.config.loss_scale == "all"
    if not messages or not (trains_all or any(message["role"] == "assistant" for message in messages)):
        return Rejected(NO_ANSWER, unsupervised=True)
    try:
        rendered = template.render(messages, tools=tools)
    except RenderError as error:
        return Rejected(str(error))
    return rendered if rendered.spans else Rejected(NOTHING_TRAINED, unsupervised=True)


def _label(
    row: Rendered,
    ids: np.ndarray,
    ranges: Sequence[tuple[int, int]],
    max_length: int | None,
    truncation_strategy: str,
) -> Encoded | Rejected:
    """Labels of a row, and what is left of it within `max_length`."""
    length = len(ids)
    too_long = max_length is not None and length > max_length and truncation_strategy != "split"
    if too_long and truncation_strategy == "delete":
        return Rejected(f"longer than --max_length {max_length}")
    labels = np.full(length, IGNORED, dtype=np.int32)
    is_weighted = any(span.weight != 1 for span in row.spans)
    scale = np.ones(length, dtype=np.float32) if is_weighted else None
    for span, (first, last) in zip(row.spans, ranges, strict=True):
        trained = slice(first, last)
        labels[trained] = ids[trained]
        if scale is not None:
            scale[trained] = span.weight
    if too_long:
        kept = (
            slice(max_length) if truncation_strategy == "right" else slice(length - (max_length or 0), None)
        )
        ids, labels, scale = ids[kept], labels[kept], None if scale is None else scale[kept]
    labels[0] = IGNORED
    if labels.max() == IGNORED:
        if too_long:
            return Rejected(f"no trained token within --max_length {max_length}")
        return Rejected(NOTHING_TRAINED, unsupervised=True)
    return Encoded(ids, labels, scale)


def cut_pieces(row: Encoded, max_length: int) -> list[Encoded]:
    """A row as rows of `max_length` tokens and the rest; without pieces that have no trained token.

    The first token of a piece is not trained: nothing stands before it.
    """
    pieces = []
    for start in range(0, len(row.input_ids), max_length):
        piece = row.cut(start, start + max_length)
        labels = piece.labels.copy()
        labels[0] = IGNORED
        if labels.max() != IGNORED:
            pieces.append(replace(piece, labels=labels))
    return pieces


def token_range(encoding: Encoding, text: str, start: int, end: int) -> tuple[int, int]:
    """Tokens [first, last) of the characters [start, end): those that start inside.

    Templates put special tokens around an answer, so as a rule nothing straddles a border. Where a token
    does, its start decides. One exception: in "ASSISTANT: Yes" the token " Yes" starts outside, but it is the
    answer.
    """
    first = _first_token(encoding, text, start)
    return first, max(first, _last_token(encoding, text, end))


def _first_token(encoding: Encoding, text: str, start: int) -> int:
    first = _token_at(encoding, start, len(text))
    if first < len(encoding) and _starts_before(text, start, *encoding.token_to_chars(first)):
        return _skip_character(encoding, first)
    return first


def _last_token(encoding: Encoding, text: str, end: int) -> int:
    last = _token_at(encoding, end, len(text))
    if last < len(encoding) and encoding.token_to_chars(last)[0] < end:
        return _skip_character(encoding, last)
    return last


def _starts_before(text: str, start: int, token_start: int, token_end: int) -> bool:
    """Whether a token belongs to what stands before `start`: all but white space followed by words."""
    if token_start >= start:
        return False
    return not text[token_start:start].isspace() or not text[start:token_end].strip()


def _token_at(encoding: Encoding, position: int, length: int) -> int:
    """The first token that covers the character at `position` or one after it."""
    token, place = None, position
    while token is None and place < length:
        token = encoding.char_to_token(place)
        place += 1
    if token is None:
        return len(encoding)
    # Tokenizers that trim offsets leave tokens of white space with no characters. Those whose (trimmed) place
    # is beyond the position asked for belong to what follows it.
    while token > 0:
        start, end = encoding.token_to_chars(token - 1)
        if start < end or start <= position:
            break
        token -= 1
    return token


def _skip_character(encoding: Encoding, token: int) -> int:
    """The token after `token` and after the rest of a character that several tokens make up."""
    place = encoding.token_to_chars(token)
    while token < len(encoding) and encoding.token_to_chars(token) == place:
        token += 1
    return token
