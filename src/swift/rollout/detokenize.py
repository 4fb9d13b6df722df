"""Text of generated tokens, whole or while they come."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    # Clean-up would glue " ." and "n 't" together, which the model did not write.
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], context: Sequence[int] = ()
) -> str:
    """Text that `token_ids` add after `context`: some decoders drop the space before a text's first word."""
    return _decode(tokenizer, [*context, *token_ids])[len(_decode(tokenizer, context)) :]


class TextStream:
    """Text of a growing sequence, given out in whole characters: the bytes of one may span several tokens.

    Each token decodes a short window again, not the whole sequence. The window starts one boundary before the
    text that is out, so that a decoder which treats a text's first token specially never shows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.window = list(context)
        self.num_shown = len(self.window)  # tokens of the window whose text is out

    def push(self, token: int) -> str:
        """New text, empty while a character is incomplete."""
        self.window.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end, broken characters included."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        shown = _decode(self.tokenizer, self.window[: self.num_shown])
        text = _decode(self.tokenizer, self.window)
        if len(text) <= len(shown) or (text.endswith(BROKEN) and not final):
            return ""
        self.window = self.window[self.num_shown :]
        self.num_shown = len(self.window)
        return text[len(shown) :]


class AnswerText:
    """Text of an answer as its tokens come, up to a stop text; what may still become one is held back."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], context: Sequence[int] = ()
    ) -> None:
        self.stream = TextStream(tokenizer, context)
        self.stop = [text for text in stop if text]
        self.text = ""
        self.num_shown = 0  # characters
        self.stopped = False

    def push(self, token: int) -> str:
        """New text that can be shown; `stopped` tells whether a stop text came, which is no part of it."""
        return self._add(self.stream.push(token))

    def flush(self) -> str:
        """The rest, when the answer ends by itself; `text` is then the whole."""
        piece = self._add(self.stream.flush())
        if self.stopped:
            return piece
        rest, self.num_shown = self.text[self.num_shown :], len(self.text)
        return piece + rest

    def _add(self, piece: str) -> str:
        if self.stopped or not piece:
            return ""
        self.text += piece
        places = [self.text.find(stop, self.num_shown) for stop in self.stop]
        found = [place for place in places if place >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
        held = 0 if self.stopped else max((overlap(self.text, stop) for stop in self.stop), default=0)
        end = max(len(self.text) - held, self.num_shown)
        shown, self.num_shown = self.text[self.num_shown : end], end
        return shown


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`, without being the whole of it."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
