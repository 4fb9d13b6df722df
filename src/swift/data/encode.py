"""Rows to token ids, once, before training.

Owns: the flat memory of encoded rows, the report of rows that cannot be used and what follows from it, the
worker processes. Not here: one row's tokens (template/tokenize.py), batches (collate.py).
"""

import hashlib
import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.progress import track

from swift.config.data import DataConfig
from swift.config.option import ConfigError
from swift.config.template import TemplateConfig
from swift.data.formats import PREFERENCE_DATA, to_sample
from swift.data.types import Row, RowError, Sample, place
from swift.template.chat import ChatTemplate
from swift.template.tokenize import IGNORED, Encoded, Rejected, encode_chats
from swift.template.types import Message
from swift.utils.log import console

_CHUNK = 500  # rows handed to the tokenizer, or to a worker process, at once
_WORTH_A_WORKER = 5_000  # rows: a process takes seconds to start
_WORTH_A_BAR = 20_000  # rows

_Chat = tuple[tuple[Message, ...], list[Any] | None]


class EncodedDataset:
    """Encoded rows and the samples they come from, by the same index. R = rows, N = tokens of all."""

    def __init__(self, flat: Encoded, lengths: Sequence[int], samples: list[Sample]) -> None:
        assert len(lengths) == len(samples), (len(lengths), len(samples))
        self.ids = flat.input_ids  # [N] int32
        self.labels = flat.labels  # [N] int32, not shifted
        self.loss_scale = flat.loss_scale  # [N] float32; none = 1 everywhere
        self.lengths = np.array(lengths, dtype=np.int64)  # [R] tokens
        self.offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])  # [R + 1]
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:
        end = self.offsets[index % len(self) + 1]
        kept = slice(end - self.lengths[index], end)
        return Encoded(
            self.ids[kept], self.labels[kept], None if self.loss_scale is None else self.loss_scale[kept]
        )

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORED))

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that is trained on."""
        digest = hashlib.sha256()
        for array in (self.ids, self.labels, self.offsets, self.loss_scale):
            digest.update(b"" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows."""

    total: int
    kept: int
    dropped: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # reason -> (file, line) of each

    @property
    def num_dropped(self) -> int:
        return self.total - self.kept

    def summary(self) -> str:
        """Reasons with counts and the first place, the most frequent reason first."""
        ordered = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        parts = [f"{len(places)} {reason} (first: {place(*places[0])})" for reason, places in ordered]
        return "; ".join(parts)


def encode_rows(
    rows: Sequence[Row],
    template: ChatTemplate,
    *,
    config: DataConfig,
    template_config: TemplateConfig,
    max_length: int,
    what: str = "training",
) -> tuple[EncodedDataset, EncodeReport]:
    """Encodes all rows, in order. `what` names them in messages.

    Raises ConfigError: at the first bad row with --strict; where no row is left; where a row has nothing to
    learn (unless --allow_unsupervised); where more than --max_drop_ratio of the rows are dropped.
    """
    dropped: dict[str, list[tuple[str, int]]] = {}
    unsupervised: list[str] = []

    def drop(row: Row | Sample, rejected: Rejected) -> None:
        if config.strict:
            raise ConfigError(
                f"{place(row.file, row.line)}: {rejected.reason}",
                hint="--strict true stops at the first row that cannot be used",
            )
        dropped.setdefault(rejected.reason, []).append((row.file, row.line))
        if rejected.unsupervised:
            unsupervised.append(f"{place(row.file, row.line)}: {rejected.reason}")

    samples = []
    for row in rows:
        try:
            samples.append(to_sample(row))
        except RowError as error:
            drop(row, Rejected(str(error)))
    kept: list[Sample] = []
    lengths: list[int] = []
    parts: list[Encoded] = []
    job = _Job(template, max_length, template_config.truncation_strategy)
    waiting = iter(samples)
    for outcomes in _encode_chunks(job, samples, config.dataset_num_proc):
        encoded = []
        for outcome in outcomes:
            sample = next(waiting)
            if isinstance(outcome, Rejected):
                drop(sample, outcome)
            else:
                kept.append(sample)
                encoded.append(outcome)
        lengths += [len(row.input_ids) for row in encoded]
        parts.append(_concatenate(encoded))
    report = EncodeReport(len(rows), len(kept), dropped)
    _judge(report, unsupervised, config, what)
    return EncodedDataset(_concatenate(parts), lengths, kept), report


@dataclass(frozen=True, slots=True)
class _Job:
    """What a worker needs to know, besides the rows."""

    template: ChatTemplate
    max_length: int
    truncation_strategy: str

    def encode(self, chats: Sequence[_Chat]) -> list[Encoded | Rejected]:
        return encode_chats(
            self.template,
            [messages for messages, _ in chats],
            tools=[tools for _, tools in chats],
            max_length=self.max_length,
            truncation_strategy=self.truncation_strategy,
        )


def _encode_chunks(job: _Job, samples: Sequence[Sample], num_proc: int) -> Iterable[list[Encoded | Rejected]]:
    starts = range(0, len(samples), _CHUNK)
    chunks = ([(sample.messages, sample.tools) for sample in samples[i : i + _CHUNK]] for i in starts)
    workers = min(num_proc, len(samples) // _WORTH_A_WORKER)
    if workers > 1:
        # spawn: the parent may hold threads (the tokenizer's, torch's) that a forked child would wait for.
        with multiprocessing.get_context("spawn").Pool(workers, _set_job, (job,)) as pool:
            yield from _with_bar(pool.imap(_run_job, chunks), len(starts), len(samples))
    else:
        yield from _with_bar(map(job.encode, chunks), len(starts), len(samples))


def _with_bar(chunks: Iterable[Any], num_chunks: int, num_rows: int) -> Iterable[Any]:
    if num_rows < _WORTH_A_BAR:
        return chunks
    return track(chunks, f"encoding {num_rows} rows", total=num_chunks, console=console(), transient=True)


# The job of this worker process, sent once at its start: a tokenizer is too large to go with every chunk.
_jobs: list[_Job] = []


def _set_job(job: _Job) -> None:
    _jobs[:] = [job]


def _run_job(chats: list[_Chat]) -> list[Encoded | Rejected]:
    return _jobs[0].encode(chats)


def _concatenate(parts: list[Encoded]) -> Encoded:
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


def _judge(report: EncodeReport, unsupervised: list[str], config: DataConfig, what: str) -> None:
    """Raises ConfigError where these rows should not be trained on."""
    if report.total == 0:
        raise ConfigError(f"there are no {what} rows")
    if report.kept == 0:
        raise ConfigError(
            f"none of the {report.total} {what} rows can be used: {report.summary()}", hint=_hint(report)
        )
    if unsupervised and not config.allow_unsupervised:
        raise ConfigError(
            f"{unsupervised[0]}, so there is nothing to learn from it "
            f"({len(unsupervised)} of {report.total} {what} rows)",
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
        return "raise --max_length, or cut rows with --truncation_strategy right"
    if reason.startswith(PREFERENCE_DATA):
        return "use swift rlhf --rlhf_type dpo for these rows"
    if reason.startswith("no column"):
        return 'name the columns: --columns \'{"YOUR_COLUMN": "query", "OTHER_COLUMN": "response"}\''
    return None
