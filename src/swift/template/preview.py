"""One encoded row as text, cut where the weight of the loss changes: what people see before training."""

from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from swift.template.tokenize import IGNORED, Encoded


def trained_segments(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[tuple[str, float]]:
    """(text, weight) pieces, weight 0 = not trained. Joined they are exactly the decoded row."""
    trained = encoded.labels != IGNORED
    scale = trained.astype(np.float32) if encoded.loss_scale is None else encoded.loss_scale * trained
    whole = _decode(tokenizer, encoded.input_ids)
    pieces: list[tuple[str, float]] = []
    tokens = characters = 0
    for weight, run in groupby(scale.tolist()):
        tokens += sum(1 for _ in run)
        # Decoding from the beginning each time: a piece alone would lose spaces, or half of a character.
        end = _common_length(whole, _decode(tokenizer, encoded.input_ids[:tokens]), characters)
        pieces.append((whole[characters:end], weight))
        characters = end
    return [piece for piece in pieces if piece[0]]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _common_length(whole: str, part: str, start: int) -> int:
    if whole.startswith(part):
        return max(start, len(part))
    differing = (i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b)
    same = next(differing, min(len(whole), len(part)))
    return max(start, same)
