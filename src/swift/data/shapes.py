"""Which conversations, and which numbers beside them, a row holds for each way of training.

Owns: the table of row shapes. Not here: the columns of each (formats.py, preference.py), tokens (encode.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

from swift.data.formats import to_sample
from swift.data.preference import to_kto, to_preference
from swift.data.types import Row, Sample


@dataclass(frozen=True, slots=True)
class Example:
    """A row as it is trained on: conversations that stay together, and numbers that go with them."""

    samples: tuple[Sample, ...]
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows are read. Raises RowError for a row that is not of this shape."""

    read: Callable[[Row], Example]
    values: tuple[str, ...] = ()  # names of an example's numbers


def _read_chat(row: Row) -> Example:
    return Example((to_sample(row),))


def _read_pair(row: Row) -> Example:
    pair = to_preference(row)
    return Example((pair.chosen, pair.rejected), (pair.margin or 0.0,))


def _read_kto(row: Row) -> Example:
    liked = to_kto(row)
    return Example((liked.sample,), (float(liked.label),))


SHAPES: dict[str, Shape] = {
    "chat": Shape(_read_chat),
    "pair": Shape(_read_pair, ("margin",)),  # chosen, rejected
    "kto": Shape(_read_kto, ("label",)),  # 1 = liked
}
