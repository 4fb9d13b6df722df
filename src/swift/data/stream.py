"""Rows that are read and encoded while a run trains: `--streaming true`.

Owns: the order of a pass over files that nobody has counted, the processes that encode ahead of training, and
the place in the stream that a checkpoint keeps. Not here: what the values of --dataset name (sources.py),
one row's tokens (encode.py).

A pass is cut into blocks: some rows that follow each other, or, for packing, as many as fill `WINDOW` packs.
Blocks depend on the data and the flags alone, so that a place is a block and the number of its items that
have been used, an item being a row or a pack. To go on from there, rows before the block are read and not
encoded.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any

import numpy as np

from swift.config.data import DataConfig
from swift.config.option import ConfigError
from swift.data.encode import (
    Chunk,
    EncodedDataset,
    Encoder,
    concatenate,
    name_values,
    open_workers,
    pad_parts,
    run_ahead,
)
from swift.data.pack import pack_lengths
from swift.data.rows import Line, Part, mark_ends, parse_row
from swift.data.sources import mix_streams, open_spec
from swift.data.types import Row, place
from swift.template.tokenize import Encoded
from swift.utils.log import warn

WINDOW = 128  # packs whose rows are chosen together: on average half a pack of a window stays empty
_CHUNK = 128  # rows handed to the tokenizer, or to a worker process, at once


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row by itself."""

    sequences: list[Encoded]
    values: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.input_ids) for sequence in self.sequences)


def gather_rows(rows: Sequence[EncodedRow], shape: str) -> EncodedDataset:
    """These rows as a data set in memory. Where they were read is not known any more."""
    flat = concatenate([sequence for row in rows for sequence in row.sequences])
    parts = pad_parts([[len(sequence.input_ids) for sequence in row.sequences] for row in rows])
    values = name_values(shape, [row.values for row in rows])
    return EncodedDataset(flat, parts, [("", 0)] * len(rows), values=values, shape=shape)


Item = list[EncodedRow]  # one row, or the rows of a pack


@dataclass(frozen=True)
class RowStream:
    """The order of rows, pass by pass. Nothing is counted ahead and only a buffer's rows are in memory."""

    tables: Sequence[tuple[Sequence[Part], int | None]]  # of each --dataset its parts and how many rows
    columns: dict[str, Any] = field(default_factory=dict)
    mix: Sequence[float] = ()
    stop_mixing: str = "first_exhausted"
    seed: int = 42
    buffer_size: int = 0  # rows of which the next one is drawn; 0 = in the order of the files

    def rows(self, epoch: int = 0, skip: int = 0) -> Iterator[Row | Line]:
        """One pass, without its first `skip` rows. A function of (seed, epoch) and the content."""
        openers = [partial(_read_table, *table) for table in self.tables]
        if self.mix:
            rows = mix_streams(openers, weights=self.mix, seed=self.seed, stop=self.stop_mixing)
        else:
            rows = chain.from_iterable(opener() for opener in openers)
        if self.buffer_size:
            rows = shuffle_stream(rows, self.buffer_size, seed=self.seed, epoch=epoch)
        return islice(rows, skip, None)

    def head(self, count: int) -> list[Row]:
        """The first rows of the files, parsed."""
        rows = islice(replace(self, buffer_size=0).rows(), count)
        return [parse_row(item, self.columns) for item in rows]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the sizes and ends of all files and of how they are put together: none is read whole."""
        marks = [[[mark_ends(part) for part in parts], count] for parts, count in self.tables]
        known = [marks, self.columns, list(self.mix), self.stop_mixing, self.seed, self.buffer_size]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def open_stream(data: DataConfig, *, seed: int, use_hf: bool, token: str | None) -> RowStream:
    """The training rows that a run names."""
    tables = []
    for text in data.dataset:
        rows, count = open_spec(text, names=(data.model_name, data.model_author), use_hf=use_hf, token=token)
        tables.append((rows.parts, count))
    return RowStream(
        tables, data.columns, data.interleave_prob, data.stopping_strategy, seed,
        data.shuffle_buffer_size if data.train_dataloader_shuffle else 0,
    )  # fmt: skip


def _read_table(parts: Sequence[Part], count: int | None) -> Iterator[Row | Line]:
    return islice(chain.from_iterable(part.stream() for part in parts), count)


def shuffle_stream(rows: Iterator[Any], size: int, *, seed: int, epoch: int) -> Iterator[Any]:
    """Each row is drawn from `size` of them, then the next one read takes its place.

    RandomState because numpy promises never to change it.
    """
    draw = np.random.RandomState([seed % 2**32, epoch])
    held = list(islice(rows, size))
    while len(held) == size and (more := list(islice(rows, size))):
        for index, row in zip(draw.randint(size, size=len(more)).tolist(), more, strict=True):
            yield held[index]
            held[index] = row
    yield from (held[i] for i in draw.permutation(len(held)))


@dataclass(frozen=True)
class Position:
    """A place in the stream. `read` and `dropped` count what came before the block, in all passes."""

    epoch: int = 0
    row: int = 0  # of the pass: the first of the block
    item: int = 0  # items of the block that have been used
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows


class EncodedStream:
    """Encoded rows or packs, pass after pass without end, from a position on. Read by `next_item`.

    `capacity`: tokens of a pack, none without packing. `workers`: processes that encode ahead of whoever
    reads; none = this one encodes. They are forked here, so make one before anything starts threads.
    """

    def __init__(
        self,
        source: RowStream,
        encoder: Encoder,
        *,
        capacity: int | None = None,
        workers: int = 1,
        position: Position | None = None,
    ) -> None:
        self.position = position or Position()
        self.dropped: Counter[str] = Counter()  # with those of the block
        self.read = 0
        self.shape = encoder.shape
        self._source = source
        self._encoder = replace(encoder, columns=source.columns)
        self._capacity = capacity
        self._ahead = 3 * workers
        self._pool = open_workers(self._encoder, workers) if workers else None
        self._items = self._read_items(self.position)

    @property
    def fingerprint(self) -> str:
        """Of the rows and the size of packs."""
        return f"{self._source.fingerprint}-{self._capacity}"

    def next_item(self) -> Item | None:
        """The next row or pack; none at the end of a pass. `position` is then behind it."""
        return next(self._items)

    def close(self) -> None:
        """Ends the processes; what they are at is thrown away."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_items(self, start: Position) -> Iterator[Item | None]:
        used = start.item
        is_barren = start.row == 0  # as long as this pass has not brought a row
        for chunks, is_last in self._read_blocks(start):
            self._count(chunks)
            items = self._make_items(chunks)
            block = self.position
            for number in range(used, len(items)):
                self.position = replace(block, item=number + 1)
                yield items[number]
            used, is_barren = 0, is_barren and not items
            if is_last and is_barren:
                raise ConfigError(f"none of the training rows can be used: {', '.join(self.dropped)}")
            epoch, row = (block.epoch + 1, 0) if is_last else (block.epoch, block.row + _rows_in(chunks))
            self.position = Position(epoch, row, 0, self.read, dict(self.dropped))
            if is_last:
                is_barren = True
                yield None

    def _read_blocks(self, start: Position) -> Iterator[tuple[list[Chunk], bool]]:
        """The chunks of each block, and whether it is the last of its pass."""
        block: list[Chunk] = []
        for chunk in self._read_chunks(start):
            is_last = _rows_in([chunk]) == 0
            block.append(chunk)
            tokens = sum(len(chunk.flat.input_ids) for chunk in block)
            if is_last or tokens >= WINDOW * (self._capacity or 0):
                self._ahead = max(self._ahead, len(block) + 1)  # so that the next window is encoded by then
                yield block, is_last
                block = []

    def _read_chunks(self, start: Position) -> Iterator[Chunk]:
        if self._pool is None:
            return (self._encoder.encode(*task) for task in self._read_tasks(start))
        return run_ahead(self._pool, self._read_tasks(start), lambda: self._ahead)

    def _read_tasks(self, start: Position) -> Iterator[tuple[int, list[Row | Line]]]:
        """Rows with the number of the first; a task without rows ends a pass."""
        epoch, number = start.epoch, start.row
        while True:
            rows = self._source.rows(epoch, number)
            while some := list(islice(rows, _CHUNK)):
                yield number, some
                number += len(some)
            if number == 0:
                raise ConfigError("there are no training rows")
            yield number, []
            epoch, number = epoch + 1, 0

    def _count(self, chunks: Sequence[Chunk]) -> None:
        """What was dropped; the first row of every reason is told."""
        self.dropped, self.read = Counter(self.position.dropped), self.position.read + _rows_in(chunks)
        for chunk in chunks:
            for where, rejected in chunk.dropped:
                if rejected.reason not in self.dropped:
                    warn(f"{place(*where)} dropped: {rejected.reason}; more of its kind are counted")
                self.dropped[rejected.reason] += 1

    def _make_items(self, chunks: Sequence[Chunk]) -> list[Item]:
        rows = [row for chunk in chunks for row in _split(chunk)]
        if self._capacity is None or not rows:
            return [[row] for row in rows]
        packs = pack_lengths(np.array([row.num_tokens for row in rows]), self._capacity)
        return [[rows[i] for i in packs[number]] for number in range(len(packs))]


def _rows_in(chunks: Sequence[Chunk]) -> int:
    return sum(len(chunk.kept) + len(chunk.dropped) for chunk in chunks)


def _split(chunk: Chunk) -> list[EncodedRow]:
    rows, end = [], 0
    for lengths, values in zip(chunk.parts, chunk.values, strict=True):
        ends = [end + sum(lengths[: i + 1]) for i in range(len(lengths))]
        cuts = [chunk.flat.cut(last - length, last) for last, length in zip(ends, lengths, strict=True)]
        rows.append(EncodedRow(cuts, values))
        end = ends[-1]
    return rows
