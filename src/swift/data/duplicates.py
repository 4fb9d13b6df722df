"""Texts that are the same, or nearly.

Owns: what "nearly" means (`SIMILAR` of the runs of `SHINGLE` characters in common, ignoring case, punctuation
and spacing), and finding such pairs without comparing all with all: MinHash signatures (Broder, 1997), cut
into bands, so that only texts which agree in a whole band are looked at.
"""

import re
import unicodedata
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

SIMILAR = 0.8
SHINGLE = 5  # characters
_LONGEST = 20_000  # characters of a text that are compared
_CHUNK = 50_000  # characters hashed at once: what fits into the processor's cache
_HASHES, _BANDS = 32, 8
_LIKELY = 0.6  # share of equal hashes below which SIMILAR is out of the question
_CERTAIN = 0.96  # and from which it need not be computed
_NOT_WORDS = re.compile(r"[\W_]+")
_NO_TEXT = np.uint32(2**32 - 1)


def find_equal(keys: Sequence[Hashable]) -> dict[int, int]:
    """Index of every repetition -> index of its first occurrence."""
    first: dict[Hashable, int] = {}
    found = ((i, first.setdefault(key, i)) for i, key in enumerate(keys))
    return {i: original for i, original in found if i != original}


def find_similar(texts: Sequence[str]) -> dict[int, int]:
    """Index of a text -> index of an earlier one that is nearly the same. Texts shorter than a shingle have
    nothing to compare."""
    if len(texts) < 2:
        return {}
    codes = [_normalise(text) for text in texts]
    signatures = np.concatenate([_sign(codes[part]) for part in _chunks(codes)])
    pairs: dict[int, int] = {}
    width = _HASHES // _BANDS
    for band in range(0, _HASHES, width):
        for later, earlier, agreement in _candidates(signatures, signatures[:, band : band + width]):
            if later in pairs:
                continue
            if agreement >= _CERTAIN or _similarity(codes[later], codes[earlier]) >= SIMILAR:
                pairs[later] = earlier
    return pairs


def _normalise(text: str) -> np.ndarray:
    """[C] code points of the words, lower case, one space between."""
    words = _NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()).strip()
    return np.frombuffer(words.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _chunks(codes: Sequence[np.ndarray]) -> Iterator[slice]:
    start = size = 0
    for i, code in enumerate(codes):
        if size > _CHUNK:
            yield slice(start, i)
            start, size = i, 0
        size += len(code)
    yield slice(start, len(codes))


def _shingles(code: np.ndarray) -> np.ndarray:
    """[C - SHINGLE + 1] uint32: a hash of each run of SHINGLE code points (FNV, then the high half)."""
    count = max(0, len(code) - SHINGLE + 1)
    wide = code.astype(np.uint64)
    value = wide[:count].copy()
    for i in range(1, SHINGLE):
        value *= np.uint64(0x100000001B3)
        value ^= wide[i : i + count]
    value *= np.uint64(0x9E3779B97F4A7C15)
    return (value >> np.uint64(32)).astype(np.uint32)


def _sign(codes: Sequence[np.ndarray]) -> np.ndarray:
    """[texts, _HASHES] uint32: the smallest value of each hash over a text's shingles."""
    lengths = np.array([len(code) for code in codes])
    counts = np.maximum(lengths - SHINGLE + 1, 0)
    signature = np.full((len(codes), _HASHES), _NO_TEXT)
    if not counts.any():
        return signature
    # One pass over all texts, then without the shingles that reach from one text into the next.
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    whole = inside < np.repeat(counts, lengths)
    values = _shingles(np.append(np.concatenate(codes), np.zeros(SHINGLE - 1, np.uint32)))[whole]
    starts = (np.cumsum(counts) - counts)[counts > 0]
    draw = np.random.RandomState(0)
    for i in range(_HASHES):
        factor, mask = (np.uint32(draw.randint(2**31)) for _ in range(2))
        mixed = (values ^ mask) * (factor * np.uint32(2) + np.uint32(1))
        signature[counts > 0, i] = np.minimum.reduceat(mixed, starts)
    return signature


def _candidates(signatures: np.ndarray, band: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(later, earlier, share of equal hashes) among texts with the same band.

    Each is compared with the first of its bucket and with the one before it: 2n pairs for n texts, not n².
    """
    order = np.lexsort(band.T)
    sorted_bands = band[order]
    is_first = np.append(True, (sorted_bands[1:] != sorted_bands[:-1]).any(axis=1))
    place = np.arange(len(order))
    firsts = np.maximum.accumulate(np.where(is_first, place, 0))
    later = order[~is_first]
    for earlier in (order[firsts[~is_first]], order[place[~is_first] - 1]):
        agreement = (signatures[later] == signatures[earlier]).mean(axis=1)
        likely = (agreement >= _LIKELY) & (signatures[later, 0] != _NO_TEXT)
        columns = (values[likely].tolist() for values in (later, earlier, agreement))
        yield from zip(*columns, strict=True)


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard: shingles in common / shingles of either."""
    first, second = np.unique(_shingles(a)), np.unique(_shingles(b))
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / max(1, len(first) + len(second) - common)
