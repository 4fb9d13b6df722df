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
