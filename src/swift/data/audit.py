"""What is wrong with encoded rows that can all be trained: the checks before every training.

Owns: answers as runs of trained tokens, and the checks that take linear time, each at most one warning. The
whole picture, with what takes longer, is `swift dataset inspect` (swift/dataset).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from swift.data.duplicates import find_equal
from swift.data.encode import EncodedDataset
from swift.data.types import Sample, place
from swift.template.tokenize import IGNORED

SHORT_ANSWER = 12  # tokens; a usual sentence has more
MANY_COPIES = 0.01  # share of the rows from which copies are worth a warning

THOUGHTS = ("with thoughts", "with empty thoughts", "without")
_EMPTY_THINK = re.compile(r"\s*(<think>)?\s*</think>")


@dataclass(frozen=True, slots=True)
class Answers:
    """Runs of trained tokens in the flat memory of rows. A = how many."""

    starts: np.ndarray  # [A]
    ends: np.ndarray  # [A] one past the last
    rows: np.ndarray  # [A] index of the row
    ended: np.ndarray  # [A] bool: the last token is one that ends a turn

    @property
    def lengths(self) -> np.ndarray:
        """[A] tokens, without the one that ends the turn."""
        return self.ends - self.starts - self.ended

    @property
    def is_last(self) -> np.ndarray:
        """[A] bool: the last one of its row."""
        return np.append(self.rows[1:] != self.rows[:-1], True)[: len(self.rows)]


def find_answers(dataset: EncodedDataset, stop_token_ids: Sequence[int]) -> Answers:
    """All answers, in order. A row never begins with a trained token, so that no run crosses rows."""
    trained = np.asarray(dataset.labels) != IGNORED
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0))
    starts, ends = edges[::2], edges[1::2]
    rows = np.searchsorted(dataset.offsets, starts, side="right") - 1
    return Answers(starts, ends, rows, np.isin(dataset.ids[ends - 1], stop_token_ids))


def find_copies(dataset: EncodedDataset) -> dict[int, int]:
    """Row -> the first row with the same tokens. What #N repeats is the same place, not a copy."""
    ids = np.ascontiguousarray(dataset.ids)
    keys = [
        hashlib.blake2b(ids[start:end].data, digest_size=16).digest()
        for start, end in pairwise(dataset.offsets.tolist())
    ]
    places = dataset.places
    return {i: first for i, first in find_equal(keys).items() if places[i] != places[first]}


def count_thoughts(samples: Sequence[Sample]) -> Counter[str]:
    """How the last answers of the rows begin: THOUGHTS -> rows."""
    return Counter(_thoughts(sample) for sample in samples)


def _thoughts(sample: Sample) -> str:
    answer = next((m for m in reversed(sample.messages) if m["role"] == "assistant"), None)
    if answer is not None and answer.get("reasoning_content"):
        return THOUGHTS[0]
    if answer is None or "</think>" not in answer["content"]:
        return THOUGHTS[2]
    return THOUGHTS[1 if _EMPTY_THINK.match(answer["content"]) else 0]


def is_plain_text(dataset: EncodedDataset, answers: Answers) -> bool:
    """Whether rows are trained from their beginning (--loss_scale all): there are no answers then."""
    return bool(np.all(answers.starts <= dataset.offsets[answers.rows] + 1))


def audit(dataset: EncodedDataset, stop_token_ids: Sequence[int]) -> list[str]:
    """One line for each thing that is probably not meant."""
    lines, count = [], len(dataset)
    copies = find_copies(dataset)
    if len(copies) >= max(1, MANY_COPIES * count):
        later, first = (place(*dataset.places[i]) for i in next(iter(copies.items())))
        lines.append(
            f"{len(copies):,} of {count:,} rows are exact copies of another row (first: {later} is {first})"
        )
    answers = find_answers(dataset, stop_token_ids)
    if is_plain_text(dataset, answers):
        return lines
    median = np.median(answers.lengths)
    if median < SHORT_ANSWER:
        lines.append(
            f"answers are very short: half of them have at most {median:g} token(s) "
            f"(warned below {SHORT_ANSWER}); the model will learn to answer everything that shortly"
        )
    thoughts = count_thoughts(dataset.samples)
    if len(thoughts) > 1:
        found = ", ".join(f"{thoughts[kind]:,} {kind}" for kind in THOUGHTS if thoughts[kind])
        lines.append(
            f"answers that think (<think>) and others are mixed ({found}); unless the question says which is "
            "wanted (/think, /no_think), the model cannot know"
        )
    unended = find_unended(answers)
    if len(unended):
        lines.append(
            f"{len(unended):,} of {count:,} rows do not end with a trained end-of-turn token "
            f"(first: {place(*dataset.places[int(unended[0])])}); the model does not learn to stop there"
        )
    return lines


def find_unended(answers: Answers) -> np.ndarray:
    """Rows whose last answer does not teach the model to stop."""
    return answers.rows[answers.is_last & ~answers.ended]
