"""Rows into packs: which short rows share one long sequence.

Owns: the packing and how packs are formed anew in every epoch. Not here: the order of packs (loader.py), the
batch in which every row stays a segment of its own (collate.py). R = rows, P = packs.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class Packs:
    """Row numbers, pack by pack."""

    rows: np.ndarray  # [R] int64
    offsets: np.ndarray  # [P + 1] int64: pack p is rows[offsets[p] : offsets[p + 1]]
    lengths: np.ndarray  # [R] tokens of row r, in the order of the rows
    capacity: int  # tokens that fit into a pack

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    @property
    def fill(self) -> float:
        """Share of the capacity of all packs that holds tokens."""
        return float(self.lengths.sum() / (len(self) * self.capacity))

    @property
    def fingerprint(self) -> str:
        """sha256 of which rows go together."""
        return hashlib.sha256(self.rows.tobytes() + self.offsets.tobytes()).hexdigest()

    def with_new_neighbours(self, seed: int, epoch: int) -> "Packs":
        """Rows of equal length trade places: as many packs, as full as before, with other rows together.

        A function of (seed, epoch) alone. RandomState because numpy promises never to change it.
        """
        draw = np.random.RandomState([seed % 2**32, epoch, 1]).permutation(len(self.rows))
        places = np.argsort(self.lengths[self.rows], kind="stable")
        rows = np.empty_like(self.rows)
        rows[places] = draw[np.argsort(self.lengths[draw], kind="stable")]
        return replace(self, rows=rows)


def pack_lengths(lengths: np.ndarray, capacity: int) -> Packs:
    """Best-fit decreasing: longest rows first, each into the fullest pack that still has room for it.

    Depends on the lengths alone. Packs come in the order of their first rows, and rows ascend in a pack.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[longest_first], num_packs = _best_fit(lengths, capacity)
    first = np.empty(num_packs, dtype=np.int64)
    first[pack_of[::-1]] = np.arange(len(lengths))[::-1]  # of several writes the last one stays
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(num_packs)
    pack_of = rank[pack_of]
    ends = np.cumsum(np.bincount(pack_of, minlength=num_packs))
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), ends])
    return Packs(np.argsort(pack_of, kind="stable"), offsets, lengths, capacity)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """[R] the pack of each row, longest row first, and the number of packs.

    Rows of one length are placed together. Of the packs into which a row fits, the fullest one stays the
    fullest until the next row of this length does not fit, so all packs of equal room take equally many at
    once. That makes the time depend on how many different lengths there are rather than on how many rows.
    """
    values, counts = np.unique(lengths, return_counts=True)
    assert len(values) == 0 or (values[0] > 0 and values[-1] <= capacity), (values[:1], values[-1:], capacity)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # room in tokens -> packs
    rooms = 0  # bit r is set where some pack has room for r tokens and no more
    num_packs = start = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = start + count
        while start < end:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = min(room // length, end - start)
            wanted = (end - start) // each
            if fitting:
                packs = with_room[room]
                taken = packs[-wanted:]
                del packs[-wanted:]
                rooms ^= 0 if packs else 1 << room
            else:
                taken = list(range(num_packs, num_packs + wanted))
                num_packs += wanted
            placed = len(taken) * each
            pack_of[start : start + placed] = np.repeat(taken, each)
            start += placed
            left = room - each * length
            if left:
                with_room[left] += taken
                rooms |= 1 << left
    return pack_of, num_packs
