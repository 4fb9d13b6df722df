"""Rows of several sequences and with numbers: in memory, from the cache, as a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from template_families import family_template

from swift.batch import IGNORED
from swift.config.data import DataConfig
from swift.data.cache import encode_cached
from swift.data.collate import collate, collate_rows
from swift.data.encode import EncodedDataset, Encoder, EncodeReport, encode_rows
from swift.data.sources import open_rows
from swift.data.types import Row

PAIRS: list[dict[str, Any]] = [
    {"query": "q", "response": "good " * 3, "rejected_response": "bad"},
    {"prompt": "p", "chosen": "yes", "rejected": "no " * 4, "margin": 0.5},
    {"query": "q", "response": "same", "rejected_response": "same"},
    {"query": "q", "response": "fine", "rejected_response": "word " * 200},
]


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))


def encoder_of(shape: str) -> Encoder:
    return Encoder(family_template("smollm2"), 120, shape=shape)


def encode_in_memory(rows: list[dict[str, Any]], shape: str) -> tuple[EncodedDataset, EncodeReport]:
    given = [Row(row, "f.jsonl", i) for i, row in enumerate(rows, start=1)]
    return encode_rows(given, encoder_of(shape), DataConfig(max_drop_ratio=0.9))


def test_pairs_stay_together_with_their_margin() -> None:
    dataset, report = encode_in_memory(PAIRS, "pair")
    assert (len(dataset), report.kept, report.total) == (2, 2, 4)
    assert report.dropped == {
        "chosen and rejected are the same": [("f.jsonl", 3)],
        "longer than --max_length 120": [("f.jsonl", 4)],
    }
    chosen, rejected = dataset.sequences(0)
    tokenizer = family_template("smollm2").tokenizer
    answers = [tokenizer.decode(s.input_ids[s.labels != IGNORED]) for s in (chosen, rejected)]
    assert [answer.replace("<|im_end|>", "").strip() for answer in answers] == ["good good good", "bad"]
    assert dataset.lengths.tolist() == dataset.parts.sum(1).tolist()
    assert dataset.values["margin"].tolist() == [0.0, 0.5]


def test_a_batch_of_pairs_has_two_segments_each() -> None:
    dataset, _ = encode_in_memory(PAIRS, "pair")
    dataset.tokens["ref_logps"] = np.arange(dataset.num_tokens, dtype=np.float32)
    batch = collate_rows(dataset, [1, 0])
    expected = collate([*dataset.sequences(1), *dataset.sequences(0)])
    assert batch.num_segments == 4
    assert batch.input_ids.equal(expected.input_ids) and batch.labels.equal(expected.labels)
    assert batch.segment["margin"].tolist() == [0.5, 0.5, 0.0, 0.0]
    first = dataset.num_tokens - int(dataset.lengths[1])
    assert batch.token["ref_logps"].tolist() == [*range(first, dataset.num_tokens), *range(first)]


def test_pairs_come_out_of_the_cache_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    expected, _ = encode_in_memory(PAIRS, "pair")
    for _ in range(2):  # written, then found
        rows = open_rows([str(path)], seed=1, shuffle=False, columns={})
        dataset, _ = encode_cached(rows, encoder_of("pair"), DataConfig(max_drop_ratio=0.9))
        assert dataset.fingerprint == expected.fingerprint
        assert dataset.parts.tolist() == expected.parts.tolist()
        assert dataset.values["margin"].tolist() == [0.0, 0.5]
        assert dataset.samples[0].messages[-1]["content"] == "good " * 3


def test_liked_rows_carry_their_label() -> None:
    rows = [{"query": "q", "response": "a", "label": label} for label in (True, "false", 1)]
    dataset, report = encode_in_memory([*rows, {"query": "q", "response": "a"}], "kto")
    assert dataset.values["label"].tolist() == [1.0, 0.0, 1.0]
    assert report.dropped == {"no label": [("f.jsonl", 4)]}
    assert collate_rows(dataset, [0, 1]).segment["label"].tolist() == [1.0, 0.0]
