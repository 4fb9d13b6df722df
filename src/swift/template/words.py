"""Ids of words, remembered: most words of a data set have been encoded before.

Owns: where a text can be cut so that its pieces are encoded alone as they are together, and what the pieces
became. Tokenizers whose words are not independent get no memory. Not here: labels (tokenize.py).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Encoding

_MOST_WORDS = 200_000  # remembered in one process: about 40 MB
_LONGEST_WORD = 64  # characters; longer pieces seldom come twice
_INDEPENDENT = ("Digits", "Split", "ByteLevel", "Punctuation")  # ways to split that stay inside a word
_GAPS = ("  ", " \n", "\n ", "\t", "\r", "\x0b", "\x0c")
_BORDER = re.compile(r" (?<=\S )(?=\S)")  # the space between two words

# Both sides of a border, to see that it is one.
_LEFT = ("a", "aB", "1", "12", ".", "?!", "'s", "don't", "(", '"', "é", "你", "。", "😀", "_", "-", "x\ny")
_RIGHT = ("a", "Ab", "1", "123", ".", "(", "'s", '"', "é", "你", "😀", "_", "-", "a\n", "")


# How many tokens of a piece come before a place in it.
Count = Callable[[Encoding, str, int], int]


class WordMemory:
    """A tokenizer that remembers words. Can hold `_MOST_WORDS`, then starts anew."""

    def __init__(self, backend: Any, cuts: re.Pattern[str], count_starts: Count, count_ends: Count) -> None:
        self._backend = backend
        self._cuts = cuts
        self._counts = (count_starts, count_ends)
        self._first: dict[str, bytes] = {}  # by what follows an added token: int32 ids
        self._after: dict[str, bytes] = {}  # by what follows a space: ids of the space and it
        self._long: list[tuple[dict[str, bytes], str]] = []  # of the last call
        self._inside: dict[tuple[str, int, Count], int] = {}  # tokens before a place in a piece

    def encode(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Per text: its ids [L] int32, and the tokens before the start and end of each span, in one list.

        Spans are characters [start, end), ascending.
        """
        for text, borders in zip(texts, spans, strict=True):
            self._forget()
            yield self._row(text, list(chain.from_iterable(borders)))

    def _forget(self) -> None:
        for known, word in self._long:
            known.pop(word, None)
        self._long = []
        if len(self._first) + len(self._after) + len(self._inside) > _MOST_WORDS:
            self._first, self._after, self._inside = {}, {}, {}

    def _row(self, text: str, places: list[int]) -> tuple[np.ndarray, list[int]]:
        ids: list[bytes] = []
        found: list[int] = []
        characters, size, wanted = 0, 0, iter(places)  # before this part; size in bytes
        place = next(wanted, -1)
        is_plain = text.isascii() and not any(gap in text for gap in _GAPS)
        for part in filter(None, self._cuts.split(text)):
            words = part.split(" ") if is_plain else _BORDER.split(part)  # all but the first follow a space
            encoded = self._look_up(words)
            while characters <= place < characters + len(part):
                number, before = _word_at(words, place - characters)
                tokens = (size + sum(map(len, encoded[:number]))) // 4
                word = words[0] if number == 0 else " " + words[number]
                count = self._counts[len(found) % 2]
                found.append(tokens + self._count(word, place - characters - before, count))
                place = next(wanted, -1)
            ids.append(b"".join(encoded))
            characters += len(part)
            size += len(ids[-1])
        found += [size // 4] * (len(places) - len(found))
        return np.frombuffer(b"".join(ids), dtype=np.int32), found

    def _look_up(self, words: list[str]) -> list[bytes]:
        """The ids of each word. Those that are new are encoded together."""
        try:
            following = iter(words)
            return [self._first[next(following)], *map(self._after.__getitem__, following)]
        except KeyError:
            pass
        # Not `set - keys()`, which goes through all that is known.
        for known, needed, space in ((self._first, words[:1], ""), (self._after, words[1:], " ")):
            missing = [word for word in dict.fromkeys(needed) if word not in known]
            encodings = self._backend.encode_batch_fast(
                [space + word for word in missing], add_special_tokens=False
            )
            for word, encoding in zip(missing, encodings, strict=True):
                known[word] = np.array(encoding.ids, dtype=np.int32).tobytes()
            self._long += [(known, word) for word in missing if len(word) > _LONGEST_WORD]
        return self._look_up(words)

    def _count(self, text: str, place: int, count: Count) -> int:
        if place == 0:
            return 0
        if (text, place, count) not in self._inside:
            encoding = self._backend.encode(text, add_special_tokens=False)
            self._inside[text, place, count] = count(encoding, text, place)
        return self._inside[text, place, count]


def _word_at(words: list[str], place: int) -> tuple[int, int]:
    """The number of the word that the character at `place` is in, and the characters before that word."""
    number, before, end = 0, 0, len(words[0])
    while place >= end:
        number, before = number + 1, end
        end += 1 + len(words[number])
    return number, before


def learn_words(backend: Any, count_starts: Count, count_ends: Count) -> WordMemory | None:
    """A memory for this tokenizer; none where a word's ids may depend on its neighbours."""
    added = list(backend.get_added_tokens_decoder().values())
    splitter = _state(backend.pre_tokenizer)
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    obstacles = (
        any(token.lstrip or token.rstrip or token.single_word for token in added),
        any(_BORDER.search(token.content) for token in added),
        # The place of a token then depends on what stands around it.
        '"trim_offsets": true' in json.dumps(_state(backend.post_processor)),
        _state(backend.normalizer).get("type", "NFC") != "NFC",
        bool(getattr(backend.model, "dropout", None)),
        any(step.get("type") not in _INDEPENDENT or step.get("add_prefix_space") for step in steps),
    )
    if any(obstacles) or not all(_is_border(backend, left, right) for left in _LEFT for right in _RIGHT):
        return None
    contents = sorted((token.content for token in added), key=len, reverse=True)
    cuts = re.compile(f"({'|'.join(map(re.escape, contents))})" if contents else "(?!)")
    return WordMemory(backend, cuts, count_starts, count_ends)


def _state(component: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file would have it; empty without one."""
    return {} if component is None else json.loads(component.__getstate__())


def _is_border(backend: Any, left: str, right: str) -> bool:
    pieces = backend.pre_tokenizer.pre_tokenize_str(f"{left} {right}")
    return any(start == len(left) for _, (start, _) in pieces)
