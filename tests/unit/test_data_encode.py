"""Rows to a data set: flat memory, the report of dropped rows, and when a run is stopped."""

from typing import Any

import numpy as np
import pytest
from template_families import family_template

from swift.config.data import DataConfig
from swift.config.option import ConfigError
from swift.data import encode
from swift.data.encode import EncodedDataset, Encoder, EncodeReport, encode_rows
from swift.data.types import Row
from swift.template.tokenize import IGNORED, encode_chats

LONG = "word " * 200
TEMPLATE_FLAGS = ("truncation_strategy", "loss_scale", "use_chat_template")


def rows_of(*columns: dict[str, Any]) -> list[Row]:
    return [Row(row, "f.jsonl", number) for number, row in enumerate(columns, start=1)]


def good(count: int) -> list[dict[str, Any]]:
    return [{"query": f"q{i}", "response": f"a{i}" * (i % 5 + 1)} for i in range(count)]


def run(rows: list[Row], *, max_length: int = 120, **flags: Any) -> tuple[EncodedDataset, EncodeReport]:
    template_flags = {key: flags.pop(key) for key in TEMPLATE_FLAGS if key in flags}
    config = DataConfig(**flags)
    template = family_template("smollm2", **template_flags)
    encoder = Encoder(template, max_length, template.config.truncation_strategy, config.strict)
    return encode_rows(rows, encoder, config)


def test_flat_memory_holds_every_row() -> None:
    columns = good(7)
    dataset, report = run(rows_of(*columns))
    expected = encode_chats(
        family_template("smollm2"),
        [sample.messages for sample in dataset.samples],
        max_length=None,
        truncation_strategy="delete",
    )
    assert len(dataset) == 7
    for i, row in enumerate(expected):
        assert dataset[i].input_ids.tolist() == row.input_ids.tolist()
        assert dataset[i].labels.tolist() == row.labels.tolist()
    assert dataset[-1].input_ids.tolist() == expected[-1].input_ids.tolist()
    assert dataset.lengths.tolist() == [len(row.input_ids) for row in expected]
    assert dataset.offsets.tolist() == [0, *np.cumsum(dataset.lengths).tolist()]
    assert dataset.num_tokens == sum(len(row.input_ids) for row in expected)
    assert dataset.num_trained == sum(int((row.labels != IGNORED).sum()) for row in expected)
    assert dataset.ids.dtype == dataset.labels.dtype == np.int32
    assert dataset.loss_scale is None
    assert (report.total, report.kept, report.dropped) == (7, 7, {})


def test_samples_and_report_name_the_rows() -> None:
    rows = rows_of({"query": "q", "response": "a", "id": 5}, {"foo": 1}, *good(8))
    dataset, report = run(rows)
    assert [line for _, line in dataset.places] == [1, *range(3, 11)]
    assert [sample.line for sample in dataset.samples] == [1, *range(3, 11)]
    assert dataset.samples[0].extra == {"id": 5}
    assert report.dropped == {"no column with a conversation (columns: foo)": [("f.jsonl", 2)]}
    assert report.num_dropped == 1
    assert report.summary() == "1 no column with a conversation (columns: foo) (first: f.jsonl line 2)"


def test_mixed_shapes_are_fine() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    shapes = [{"messages": messages}, {"query": "q", "response": "a"}, {"instruction": "q", "output": "a"}]
    dataset, _ = run(rows_of(*shapes))
    assert len({tuple(dataset[i].input_ids.tolist()) for i in range(3)}) == 1


def test_weights_are_kept_where_some_row_has_them() -> None:
    weighted = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "loss_scale": 2.0},
        ]
    }
    dataset, _ = run(rows_of(weighted, *good(2)))
    assert dataset.loss_scale.shape == dataset.ids.shape
    assert set(dataset[0].loss_scale[dataset[0].labels != IGNORED]) == {2.0}
    assert set(dataset[1].loss_scale) == {1.0}


def test_fingerprint_follows_what_is_trained() -> None:
    columns = good(4)
    first = run(rows_of(*columns))[0].fingerprint
    assert first == run(rows_of(*columns))[0].fingerprint
    assert len(first) == 64
    assert first != run(rows_of(*columns[::-1]))[0].fingerprint
    assert first != run(rows_of(*columns), loss_scale="all")[0].fingerprint


def failure(rows: list[Row], **flags: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        run(rows, **flags)
    assert "\n" not in caught.value.message
    return caught.value


def test_every_row_too_long() -> None:
    error = failure(rows_of(*[{"query": "q", "response": LONG}] * 3))
    assert error.message == (
        "none of the 3 training rows can be used: 3 longer than --max_length 120 (first: f.jsonl line 1)"
    )
    assert "--truncation_strategy right" in error.hint


def test_too_many_dropped_rows_stop_the_run() -> None:
    columns = [*good(6), {"query": "q", "response": LONG}, {"query": "q", "response": LONG}, {"foo": 1}]
    error = failure(rows_of(*columns))
    assert error.message == (
        "3 of 9 training rows cannot be used, more than --max_drop_ratio 0.2: "
        "2 longer than --max_length 120 (first: f.jsonl line 7); "
        "1 no column with a conversation (columns: foo) (first: f.jsonl line 9)"
    )
    _, report = run(rows_of(*columns), max_drop_ratio=0.4)
    assert (report.total, report.kept) == (9, 6)
    assert report.dropped["longer than --max_length 120"] == [("f.jsonl", 7), ("f.jsonl", 8)]


def test_preference_rows() -> None:
    error = failure(rows_of(*[{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4))
    assert "none of the 4 training rows can be used: 4 preference data" in error.message
    assert "swift rlhf --rlhf_type dpo" in error.hint


def test_row_without_answer_stops_unless_allowed() -> None:
    rows = rows_of(*good(9), {"messages": [{"role": "user", "content": "q"}]})
    error = failure(rows)
    assert error.message == (
        "f.jsonl line 10: no assistant turn, so there is nothing to learn from it (1 of 10 training rows)"
    )
    assert error.hint == "--allow_unsupervised true drops such rows"
    dataset, report = run(rows, allow_unsupervised=True)
    assert len(dataset) == 9
    assert report.dropped == {"no assistant turn": [("f.jsonl", 10)]}


def test_strict_stops_at_the_first_bad_row() -> None:
    error = failure(rows_of(*good(9), {"foo": 1}, {"bar": 1}), strict=True)
    assert error.message == "f.jsonl line 10: no column with a conversation (columns: foo)"
    error = failure(rows_of(*good(9), {"query": "q", "response": LONG}), strict=True)
    assert error.message == "f.jsonl line 10: longer than --max_length 120"


def test_no_rows() -> None:
    assert failure([]).message == "there are no training rows"


def test_truncation_keeps_rows() -> None:
    dataset, report = run(rows_of({"query": "q", "response": LONG}), truncation_strategy="right")
    assert dataset.lengths.tolist() == [120]
    assert report.kept == 1


def test_worker_processes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_WORTH_A_WORKER", 4)
    monkeypatch.setattr(encode, "_CHUNK", 3)
    rows = rows_of(*good(5), {"query": "q", "response": LONG}, *good(5))
    (alone, alone_report), (together, report) = run(rows), run(rows, dataset_num_proc=2)
    assert together.fingerprint == alone.fingerprint
    assert report == alone_report


def test_plain_documents_are_split_into_pieces_that_lose_nothing() -> None:
    documents = [{"text": LONG}, {"text": "short"}, {"text": "word " * 20 + "end"}]
    plain = {"use_chat_template": False, "loss_scale": "all"}
    whole, _ = run(rows_of(*documents), max_length=5000, **plain)
    long, short, last = whole.lengths.tolist()
    size = last - 1  # the rest of the last document, its eos, has nothing to learn and is left out
    dataset, report = run(rows_of(*documents), max_length=size, truncation_strategy="split", **plain)
    assert (report.total, report.kept, report.num_dropped) == (3, 3, 0)
    pieces = [size] * (long // size) + [long % size] * (long % size > 1)
    assert dataset.lengths.tolist() == [*pieces, short, size]
    assert [place[1] for place in dataset.places] == [1] * len(pieces) + [2, 3]
    assert dataset.ids[: sum(pieces)].tolist() == whole[0].input_ids[: sum(pieces)].tolist()
    for i in range(len(dataset)):  # every token but the first of a piece
        assert dataset[i].labels.tolist() == [IGNORED, *dataset[i].input_ids[1:].tolist()]
    assert dataset.samples[len(pieces)].messages[0]["content"] == "short"
