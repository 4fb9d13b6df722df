"""Rows to token ids, once, before training.

Owns: the flat memory of encoded rows, the report of rows that cannot be used and what follows from it, the
worker processes. Not here: one row's tokens (template/tokenize.py), what is kept on disk (cache.py), batches
(collate.py).
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from swift.config.data import DataConfig
from swift.config.option import ConfigError
from swift.data.formats import PREFERENCE_DATA
from swift.data.rows import InMemory, Line, Rows, parse_row
from swift.data.shapes import SHAPES
from swift.data.types import Example, Row, RowError, Sample, place
from swift.template.chat import ChatTemplate
from swift.template.tokenize import IGNORED, Encoded, Rejected, cut_pieces, encode_chats, encode_prompts
from swift.utils.log import console

_CHUNK = 500  # rows handed to the tokenizer, or to a worker process, at once
_WORTH_A_WORKER = 5_000  # rows: a process takes seconds to start
_WORTH_A_BAR = 20_000  # rows
_BLOCK = 1 << 20  # array elements looked at together

Place = tuple[str, int]  # file and line


class Samples(Sequence[Sample]):
    """The first conversation of each encoded row, read again when it is asked for."""

    def __init__(self, rows: Rows, kept: np.ndarray, shape: str = "chat") -> None:
        self._rows, self._kept, self._read = rows, kept, SHAPES[shape].read

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self._read(self._rows[int(self._kept[index])]).samples[0]


@dataclass(eq=False, repr=False)
class EncodedDataset:
    """Encoded rows, in memory or mapped from files. R = rows, S = their sequences, N = tokens of all."""

    flat: Encoded  # [N] all sequences, one after another
    parts: np.ndarray  # [R, K] int64 tokens of each sequence of a row; 0 = the row has fewer
    places: Sequence[Place]  # where each row was read
    values: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [R] float32, that go with a row
    shape: str = "chat"
    samples: Sequence[Sample] = ()  # empty where the rows come from --cached_dataset
    directory: Path | None = None  # what it is mapped from, if it is
    tokens: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [N] float32, computed by position

    def __post_init__(self) -> None:
        assert len(self.parts) == len(self.places), (len(self.parts), len(self.places))
        self.ids, self.labels, self.loss_scale = self.flat.input_ids, self.flat.labels, self.flat.loss_scale
        self.lengths = self.parts.sum(1)  # [R] tokens
        self.offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])  # [R + 1]
        self.by_place = SHAPES[self.shape].by_place  # numbers of the first sequence of a row, the second, ...

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        end = self.offsets[index % len(self) + 1]
        return self.flat.cut(int(end - self.lengths[index]), int(end))

    def sequences(self, index: int) -> list[Encoded]:
        """The row as sequences that do not see each other."""
        row, parts = self[index], self.parts[index]
        if len(parts) == 1:
            return [row]
        ends = np.cumsum(parts)
        return [row.cut(end - length, end) for end, length in zip(ends, parts, strict=True) if length]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @cached_property
    def num_trained(self) -> int:
        return sum(int(np.count_nonzero(block != IGNORED)) for block in _blocks(self.labels))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that is trained on."""
        digest = hashlib.sha256()
        parts = self.parts if self.parts.shape[1] > 1 else None
        arrays = (self.ids, self.labels, self.offsets, self.loss_scale, parts, *self.values.values())
        for array in arrays:
            for block in _blocks(array) if array is not None else ():
                digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[i : i + _BLOCK] for i in range(0, len(array), _BLOCK))


@dataclass(frozen=True)
class EncodeReport:
    total: int
    kept: int
    dropped: dict[str, list[Place]] = field(default_factory=dict)  # reason -> place of each
    unsupervised: tuple[str, ...] = ()  # reasons that say: the row itself has nothing to learn

    @property
    def num_dropped(self) -> int:
        return self.total - self.kept

    def summary(self) -> str:
        """Reasons with counts and the first place, the most frequent reason first."""
        ordered = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        parts = [f"{len(places)} {reason} (first: {place(*places[0])})" for reason, places in ordered]
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows, encoded. K = rows kept of them."""

    flat: Encoded  # [tokens of all]
    parts: list[tuple[int, ...]]  # [K] tokens of each sequence of a row
    kept: list[int]  # [K] which rows these are, counted from the first of all; pieces of a row share one
    places: list[Place]  # [K]
    dropped: list[tuple[Place, Rejected]]
    values: list[tuple[float, ...]]  # [K]


@dataclass(frozen=True, slots=True)
class Encoder:
    """What a worker needs to know, besides the rows. `max_length` counts tokens, `shape` is one of SHAPES."""

    template: ChatTemplate
    max_length: int
    truncation_strategy: str = "delete"
    strict: bool = False
    shape: str = "chat"
    columns: dict[str, Any] = field(default_factory=dict)

    def encode(self, first: int, items: Sequence[Row | Line]) -> Chunk:
        """The rows from number `first` on. Raises ConfigError at a line that is not JSON."""
        read = SHAPES[self.shape].read
        outcomes: list[Example | Rejected] = []
        for item in items:
            try:
                outcomes.append(read(parse_row(item, self.columns)))
            except RowError as error:
                outcomes.append(Rejected(str(error)))
        samples = [s for outcome in outcomes if isinstance(outcome, Example) for s in outcome.samples]
        encode = encode_prompts if SHAPES[self.shape].waits else encode_chats
        encoded = iter(
            encode(
                self.template,
                [sample.messages for sample in samples],
                tools=[sample.tools for sample in samples],
                max_length=self.max_length,
                truncation_strategy=self.truncation_strategy,
            )
        )
        parts: list[Encoded] = []
        chunk = Chunk(concatenate([]), [], [], [], [], [])
        for number, (item, outcome) in enumerate(zip(items, outcomes, strict=True), start=first):
            where = (item.file, item.line)
            found = [next(encoded) for _ in outcome.samples] if isinstance(outcome, Example) else [outcome]
            rejected = next((part for part in found if isinstance(part, Rejected)), None)
            if rejected is None:
                splits = self.truncation_strategy == "split"  # of chats alone, which are one sequence
                rows = [[piece] for piece in cut_pieces(found[0], self.max_length)] if splits else [found]
                for row in rows:
                    parts += row
                    chunk.parts.append(tuple(len(part.input_ids) for part in row))
                    chunk.kept.append(number)
                    chunk.places.append(where)
                    chunk.values.append(outcome.values)
            elif self.strict:
                raise ConfigError(
                    f"{place(*where)}: {rejected.reason}",
                    hint="--strict true stops at the first row that cannot be used",
                )
            else:
                chunk.dropped.append((where, rejected))
        return replace(chunk, flat=concatenate(parts))


def encode_rows(
    rows: Rows | Sequence[Row], encoder: Encoder, config: DataConfig, *, what: str = "training"
) -> tuple[EncodedDataset, EncodeReport]:
    """Encodes all rows, in order, into memory. `what` names them in messages.

    Raises ConfigError as `encode_chunks` and `judge` do.
    """
    table = rows if isinstance(rows, Rows) else Rows([InMemory(rows)])
    chunks = list(encode_chunks(encoder, table, config.dataset_num_proc))
    report = make_report(len(table), chunks)
    judge(report, config, what)
    kept = np.array([number for chunk in chunks for number in chunk.kept], dtype=np.int64)
    parts = pad_parts([part for chunk in chunks for part in chunk.parts])
    places = [place for chunk in chunks for place in chunk.places]
    flat = concatenate([chunk.flat for chunk in chunks])
    shape = encoder.shape
    values = name_values(shape, [row for chunk in chunks for row in chunk.values])
    samples = Samples(table, kept, shape)
    return EncodedDataset(flat, parts, places, values=values, shape=shape, samples=samples), report


def pad_parts(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """[R, K] int64 tokens of each sequence, 0 where a row has fewer than others."""
    longest = max(map(len, rows), default=1)
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    return np.array(padded, dtype=np.int64).reshape(-1, longest)


def name_values(shape: str, rows: Sequence[tuple[float, ...]] | np.ndarray) -> dict[str, np.ndarray]:
    """Name -> [R] float32, from the numbers of each row."""
    table = np.asarray(rows, dtype=np.float32)
    return {name: table[:, i] for i, name in enumerate(SHAPES[shape].values)}


def make_report(total: int, chunks: Iterable[Chunk]) -> EncodeReport:
    dropped: dict[str, list[Place]] = {}
    unsupervised: set[str] = set()
    kept = 0
    for chunk in chunks:
        kept += len(set(chunk.kept))
        for where, rejected in chunk.dropped:
            dropped.setdefault(rejected.reason, []).append(where)
            if rejected.unsupervised:
                unsupervised.add(rejected.reason)
    return EncodeReport(total, kept, dropped, tuple(sorted(unsupervised)))


def encode_chunks(encoder: Encoder, rows: Rows, num_proc: int) -> Iterator[Chunk]:
    """All rows, in order, a chunk at a time. Raises ConfigError at the first bad row with --strict.

    Besides the chunk only what the workers are at is in memory.
    """
    encoder = replace(encoder, columns=rows.columns)
    starts = range(0, len(rows), _CHUNK)
    tasks = ((start, rows.unparsed(slice(start, start + _CHUNK))) for start in starts)
    workers = min(num_proc, len(rows) // _WORTH_A_WORKER)
    if workers > 1:
        with open_workers(encoder, workers) as pool:
            yield from _with_bar(run_ahead(pool, tasks, lambda: 3 * workers), len(starts), len(rows))
    else:
        yield from _with_bar((encoder.encode(*task) for task in tasks), len(starts), len(rows))
    rows.check_unchanged()


def open_workers(encoder: Encoder, count: int) -> ProcessPoolExecutor:
    """Processes for `run_ahead`, which end when this one does, however it ends.

    Forked workers are ready at once; to import what they need anew takes each of them seconds. They touch
    neither torch nor the console, and the tokenizer knows how to go on without its threads.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(count, context, _set_encoder, (encoder,))
    pool.submit(_run_encoder, 0, ())  # the first task starts them
    return pool


def run_ahead(pool: ProcessPoolExecutor, tasks: Iterable[Any], ahead: Callable[[], int]) -> Iterator[Chunk]:
    """Results in order; never more than `ahead()` of them are under way, so that nothing piles up."""
    waiting: deque[Future[Chunk]] = deque()
    for task in tasks:
        waiting.append(pool.submit(_run_encoder, *task))
        if len(waiting) >= ahead():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _with_bar(chunks: Iterable[Any], num_chunks: int, num_rows: int) -> Iterable[Any]:
    if num_rows < _WORTH_A_BAR:
        return chunks
    return track(chunks, f"encoding {num_rows} rows", total=num_chunks, console=console(), transient=True)


# What this worker process does, sent once at its start: a tokenizer is too large to go with every chunk.
_encoders: list[Encoder] = []


def _set_encoder(encoder: Encoder) -> None:
    _encoders[:] = [encoder]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_encoder(first: int, items: Sequence[Row | Line]) -> Chunk:
    return _encoders[0].encode(first, items)


def concatenate(parts: list[Encoded]) -> Encoded:
    empty = np.empty(0, dtype=np.int32)
    ids = np.concatenate([empty, *(part.input_ids for part in parts)])
    labels = np.concatenate([empty, *(part.labels for part in parts)])
    if all(part.loss_scale is None for part in parts):
        return Encoded(ids, labels, None)
    scales = [
        np.ones(len(part.labels), dtype=np.float32) if part.loss_scale is None else part.loss_scale
        for part in parts
    ]
    return Encoded(ids, labels, np.concatenate(scales))


def judge(report: EncodeReport, config: DataConfig, what: str) -> None:
    """Raises ConfigError where these rows should not be trained on.

    That is where no row is left; where a row has nothing to learn (unless --allow_unsupervised); where more
    than --max_drop_ratio of the rows are dropped.
    """
    if report.total == 0:
        raise ConfigError(f"there are no {what} rows")
    if report.kept == 0:
        raise ConfigError(
            f"none of the {report.total} {what} rows can be used: {report.summary()}", hint=_hint(report)
        )
    if report.unsupervised and not config.allow_unsupervised:
        reason = report.unsupervised[0]
        count = sum(len(report.dropped[reason]) for reason in report.unsupervised)
        raise ConfigError(
            f"{place(*report.dropped[reason][0])}: {reason}, so there is nothing to learn from it "
            f"({count} of {report.total} {what} rows)",
            hint="--allow_unsupervised true drops such rows",
        )
    if report.num_dropped > config.max_drop_ratio * report.total:
        raise ConfigError(
            f"{report.num_dropped} of {report.total} {what} rows cannot be used, more than --max_drop_ratio "
            f"{config.max_drop_ratio:g}: {report.summary()}",
            hint=_hint(report),
        )


def _hint(report: EncodeReport) -> str | None:
    reason = max(report.dropped, key=lambda name: len(report.dropped[name]))
    if "--max_length" in reason:
        return "raise --max_length, or cut rows with --truncation_strategy right (plain text: split)"
    if reason.startswith(PREFERENCE_DATA):
        return "use swift rlhf --rlhf_type dpo for these rows"
    if reason.startswith("no column"):
        return 'name the columns: --columns \'{"YOUR_COLUMN": "query", "OTHER_COLUMN": "response"}\''
    return None
