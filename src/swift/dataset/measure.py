"""The numbers of `swift dataset inspect`, as plain values that can be written as JSON.

Not here: how they are shown (blocks.py), the checks that training makes as well (data/audit.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from swift.data.audit import (
    THOUGHTS,
    Answers,
    audit,
    count_thoughts,
    find_answers,
    find_copies,
    find_unended,
    is_plain_text,
)
from swift.data.duplicates import find_similar
from swift.data.encode import EncodedDataset
from swift.data.types import Sample
from swift.template.chat import ChatTemplate
from swift.template.tokenize import IGNORED

SHOWN = 5  # places and pairs that are named
REPEATED = 0.05  # share of the answers from which one and the same is worth a warning
_FEWEST_REPEATED = 3
_SMALLEST_BIN = 8  # tokens
_EXCERPT = 80  # characters
_TEXTS = 1_000  # handed to the tokenizer at once


@dataclass(frozen=True)
class Reason:
    """Rows that have something in common, the first few by place ("data.jsonl:3")."""

    reason: str
    count: int
    places: list[str]


@dataclass(frozen=True)
class Truncation:
    """What a --truncation_strategy does to rows longer than --max_length."""

    strategy: str
    rows_dropped: int
    tokens_lost: int
    trained_tokens_lost: int


@dataclass(frozen=True)
class Inspection:
    """All numbers. Lengths are tokens; a histogram's bins double in width and are named by their ends."""

    sources: dict[str, int]  # file -> rows read
    rows: int  # read, with those that are no rows at all
    kept: int
    dropped: list[Reason]
    tokens: dict[str, float]
    trained_share: float
    max_length: int
    too_long: Reason
    truncation: list[Truncation]
    turns: dict[str, int]
    question_lengths: dict[str, int]
    answer_lengths: dict[str, int]
    row_lengths: dict[str, int]
    median_answer: float
    empty_answers: Reason
    repeated_answers: list[Reason]
    thoughts: dict[str, int]
    unended: Reason
    ends_with_question: Reason
    copies: Reason
    near_duplicates: Reason | None  # none = not looked for
    warnings: list[str]


def inspect(
    dataset: EncodedDataset,
    *,
    sources: dict[str, int],
    dropped: dict[str, list[tuple[str, int]]],
    max_length: int,
    template: ChatTemplate,
    near_duplicates: bool,
) -> Inspection:
    """Measures rows that were encoded without a limit to their length.

    dropped: reason -> (file, line) of rows that cannot be used. template: the one that encoded them.
    """
    samples, lengths = dataset.samples, dataset.lengths
    answers = find_answers(dataset, template.stop_token_ids)
    plain = is_plain_text(dataset, answers)
    answer_lengths = np.empty(0, np.int64) if plain else answers.lengths
    copies = find_copies(dataset)
    thoughts = count_thoughts(samples)
    questions = [m["content"] for sample in samples for m in sample.messages if m["role"] == "user"]
    too_long = np.flatnonzero(lengths > max_length).tolist()
    unended = [] if plain else find_unended(answers).tolist()
    asking = [i for i, sample in enumerate(samples) if sample.messages[-1]["role"] != "assistant"]
    empty = [] if plain else answers.rows[answer_lengths == 0].tolist()
    num_bad = sum(len(places) for places in dropped.values())
    found = Inspection(
        sources=sources,
        rows=len(dataset) + num_bad,
        kept=len(dataset),
        dropped=[
            Reason(reason, len(places), [f"{file}:{line}" for file, line in places[:SHOWN]])
            for reason, places in sorted(dropped.items(), key=lambda item: -len(item[1]))
        ],
        tokens={
            "total": int(lengths.sum()),
            "trained": dataset.num_trained,
            "mean": round(float(lengths.mean()), 1),
            "p50": int(np.percentile(lengths, 50, method="nearest")),
            "p95": int(np.percentile(lengths, 95, method="nearest")),
            "max": int(lengths.max()),
        },
        trained_share=dataset.num_trained / dataset.num_tokens,
        max_length=max_length,
        too_long=_reason(f"longer than --max_length {max_length}", too_long, samples),
        truncation=measure_truncation(dataset, max_length),
        turns=_count_turns(samples),
        question_lengths=histogram(_count_tokens(template, questions)),
        answer_lengths=histogram(answer_lengths),
        row_lengths=histogram(lengths),
        median_answer=float(np.median(answer_lengths)) if len(answer_lengths) else 0.0,
        empty_answers=_reason("empty answers", empty, samples),
        repeated_answers=[] if plain else find_repeated(dataset, answers, template),
        thoughts={} if plain else {kind: thoughts[kind] for kind in THOUGHTS},
        unended=_reason("no trained end-of-turn token at the end", unended, samples),
        ends_with_question=_reason("the last message is not the assistant's", asking, samples),
        copies=_pairs("exact copies", copies, samples),
        near_duplicates=find_near_duplicates(samples, copies) if near_duplicates else None,
        warnings=audit(dataset, template.stop_token_ids),
    )
    return replace(found, warnings=[*found.warnings, *_warn(found, len(answer_lengths))])


def histogram(values: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Counts by length, in bins 0-7, 8-15, 16-31 and so on, from the first to the last that is not empty."""
    if not len(values):
        return {}
    bins = np.maximum(0, np.floor(np.log2(np.maximum(values, 1) / _SMALLEST_BIN)).astype(int) + 1)
    counts = np.bincount(bins)
    names = [f"{_SMALLEST_BIN << i >> 1 if i else 0}-{(_SMALLEST_BIN << i) - 1}" for i in range(len(counts))]
    first = int(np.flatnonzero(counts)[0])
    return {names[i]: int(counts[i]) for i in range(first, len(counts))}


def measure_truncation(dataset: EncodedDataset, max_length: int) -> list[Truncation]:
    """What each strategy loses; a row that has no trained token left is dropped."""
    long = dataset.lengths > max_length
    lengths, starts = dataset.lengths[long], dataset.offsets[:-1][long]
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(dataset.labels) != IGNORED)])
    ends = starts + lengths
    all_trained = before[ends] - before[starts]
    lost = [Truncation("delete", len(lengths), int(lengths.sum()), int(all_trained.sum()))]
    for strategy, first in (("right", starts), ("left", ends - max_length)):
        trained = before[first + max_length] - before[first]
        # A kept first token is not trained: nothing predicts it.
        trained = trained - (before[first + 1] - before[first])
        tokens = np.where(trained > 0, max_length, 0)
        lost.append(
            Truncation(
                strategy,
                int((trained == 0).sum()),
                int((lengths - tokens).sum()),
                int((all_trained - trained).sum()),
            )
        )
    return lost


def find_repeated(dataset: EncodedDataset, answers: Answers, template: ChatTemplate) -> list[Reason]:
    """Answers that many different questions get, the most frequent first."""
    seen: dict[bytes, dict[bytes, int]] = {}  # answer -> what precedes it -> row
    ids = np.ascontiguousarray(dataset.ids)
    columns = (answers.starts.tolist(), answers.ends.tolist(), answers.rows.tolist())
    for start, end, row in zip(*columns, strict=True):
        question = ids[dataset.offsets[row] : start].tobytes()
        seen.setdefault(ids[start:end].tobytes(), {}).setdefault(question, row)
    fewest = max(_FEWEST_REPEATED, REPEATED * len(answers.rows))
    frequent = sorted((item for item in seen.items() if len(item[1]) >= fewest), key=lambda i: -len(i[1]))
    found = []
    for key, rows in frequent[:SHOWN]:
        answer = template.tokenizer.decode(np.frombuffer(key, ids.dtype).tolist(), skip_special_tokens=True)
        found.append(_reason(_excerpt(answer), list(rows.values()), dataset.samples))
    return found


def find_near_duplicates(samples: Sequence[Sample], copies: dict[int, int]) -> Reason:
    """Rows whose conversation is nearly that of an earlier one, without copies and what #N repeats."""
    places: dict[tuple[str, int], int] = {}
    kept = [
        i for i, s in enumerate(samples) if places.setdefault((s.file, s.line), i) == i and i not in copies
    ]
    texts = [
        "\n".join(m["content"] for m in samples[i].messages if m["role"] in ("user", "assistant"))
        for i in kept
    ]
    similar = {kept[later]: kept[earlier] for later, earlier in find_similar(texts).items()}
    return _pairs("nearly the same as another row", dict(sorted(similar.items())), samples)


def _count_tokens(template: ChatTemplate, texts: list[str]) -> list[int]:
    backend, starts = template.tokenizer.backend_tokenizer, range(0, len(texts), _TEXTS)
    chunks = (backend.encode_batch_fast(texts[i : i + _TEXTS], add_special_tokens=False) for i in starts)
    return [len(encoding) for chunk in chunks for encoding in chunk]


def _count_turns(samples: Sequence[Sample]) -> dict[str, int]:
    """Answers in a conversation -> conversations; nine and more together."""
    counts = Counter(
        min(9, sum(message["role"] == "assistant" for message in sample.messages)) for sample in samples
    )
    return {f"{turns}+" if turns == 9 else str(turns): counts[turns] for turns in sorted(counts)}


def _reason(text: str, rows: list[int], samples: Sequence[Sample]) -> Reason:
    return Reason(text, len(rows), [_place(samples[i]) for i in rows[:SHOWN]])


def _pairs(text: str, pairs: dict[int, int], samples: Sequence[Sample]) -> Reason:
    shown = list(pairs.items())[:SHOWN]
    return Reason(text, len(pairs), [f"{_place(samples[a])} is {_place(samples[b])}" for a, b in shown])


def _place(sample: Sample) -> str:
    return f"{sample.file}:{sample.line}"


def _excerpt(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _EXCERPT else words[: _EXCERPT - 1] + "…"


def _warn(found: Inspection, num_answers: int) -> list[str]:
    """Warnings that training does not repeat: it says them its own way, or they take too long."""
    lines = []
    if found.dropped:
        lines.append(f"{found.rows - found.kept:,} of {found.rows:,} rows cannot be used")
    if found.too_long.count:
        lines.append(f"rows {found.too_long.reason}: {found.too_long.count:,}")
    if found.empty_answers.count:
        lines.append(
            f"{found.empty_answers.count:,} answers are empty (first: {found.empty_answers.places[0]})"
        )
    for repeated in found.repeated_answers[:1]:
        lines.append(
            f"{repeated.count:,} of {num_answers:,} answers are the same, to different questions: "
            f"{repeated.reason}"
        )
    if found.ends_with_question.count:
        lines.append(
            f"{found.ends_with_question.count:,} conversations do not end with the assistant "
            f"(first: {found.ends_with_question.places[0]}); what follows its last answer is not trained"
        )
    near = found.near_duplicates
    if near and near.count >= max(1, REPEATED * found.kept):
        lines.append(f"{near.count:,} rows are {near.reason} (first: {near.places[0]})")
    return lines
