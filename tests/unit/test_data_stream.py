"""Rows as a stream: the order, packs, and going on in the middle of it."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from template_families import family_template

from swift.config.option import ConfigError
from swift.data.encode import Encoder
from swift.data.feed import StreamFeed
from swift.data.rows import parse_row
from swift.data.sources import mix_tables, open_rows, open_spec
from swift.data.stream import EncodedStream, Item, Position, RowStream, mix_streams, shuffle_stream


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(count: int, *, mean: float = 2.5, bad_every: int = 0) -> list[dict[str, Any]]:
    """Rows of different lengths, log-normal; some of an unknown shape."""
    words = np.clip(np.random.RandomState(3).lognormal(mean, 0.8, count), 1, 25 * mean**2).astype(int)
    rows = [
        {"query": f"question {i}", "response": "a " * int(words[i]) + f"number {i}."} for i in range(count)
    ]
    return [{"nothing": i} if bad_every and i % bad_every == 1 else row for i, row in enumerate(rows)]


def source_of(*files: Path | str, **options: Any) -> RowStream:
    tables = []
    for file in files:
        rows, count = open_spec(str(file), names=((), ()), use_hf=False, token=None)
        tables.append((rows.parts, count))
    return RowStream(tables, **options)


def stream_of(source: RowStream, *, position: Position | None = None, **options: Any) -> EncodedStream:
    longest = options.get("capacity") or 256
    encoder = Encoder(family_template("smollm2"), longest, "delete", strict=False)
    return EncodedStream(source, encoder, position=position, **{"workers": 0} | options)


def ids_of(item: Item | None) -> Any:
    return item and [row.sequences[0].input_ids.tolist() for row in item]


def lines_of(source: RowStream, epoch: int = 0, skip: int = 0) -> list[int]:
    return [item.line for item in source.rows(epoch, skip)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", chats(600, bad_every=30))


def test_without_a_buffer_rows_come_as_they_are(file: Path) -> None:
    expected = open_rows([str(file)], seed=1, shuffle=False, columns={})
    assert [parse_row(item, {}) for item in source_of(file).rows()] == list(expected)
    assert lines_of(source_of(file), skip=590) == list(range(591, 601))
    assert lines_of(source_of(f"{file}#7", f"{file}#2")) == [1, 2, 3, 4, 5, 6, 7, 1, 2]


def test_the_buffer_loses_nothing_and_is_a_function_of_seed_and_epoch(file: Path) -> None:
    orders = {
        (seed, epoch): lines_of(source_of(file, buffer_size=100, seed=seed), epoch)
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(1, 601)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[1, 1] == lines_of(source_of(file, buffer_size=100, seed=1), epoch=1)
    assert orders[1, 1][300:] == lines_of(source_of(file, buffer_size=100, seed=1), epoch=1, skip=300)
    # A row is never more than the buffer ahead of its place.
    assert all(line - place <= 200 for place, line in enumerate(orders[1, 0], start=1))


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101])
def test_buffers_at_least_as_large_as_the_data(count: int) -> None:
    assert sorted(shuffle_stream(iter(range(count)), 100, seed=0, epoch=0)) == list(range(count))


def test_the_order_is_pinned() -> None:
    """A change here would change every user's run, and where a checkpoint goes on."""
    assert list(shuffle_stream(iter(range(10)), 4, seed=42, epoch=0)) == [2, 1, 5, 0, 6, 3, 9, 7, 8, 4]


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("lengths", [(50, 3000), (5, 7, 9), (1, 1)])
def test_mixing_streams_is_mixing_tables(lengths: tuple[int, ...], stop: str) -> None:
    starts = np.cumsum([0, *lengths])
    openers = [lambda i=i: iter(range(starts[i], starts[i + 1])) for i in range(len(lengths))]
    options: dict[str, Any] = {"weights": [0.3, 0.7, 0.2][: len(lengths)], "seed": 5, "stop": stop}
    assert list(mix_streams(openers, **options)) == mix_tables(lengths, **options).tolist()


def test_blocks_are_passes_over_all_rows_that_can_be_used(file: Path) -> None:
    source = source_of(file, buffer_size=100)
    stream = stream_of(source)
    whole = [ids_of(stream.next_item()) for _ in range(581)]
    assert whole[-1] is None and None not in whole[:-1]
    assert stream.position == Position(1, 0, 0, 600, {"no column with a conversation (columns: nothing)": 20})
    again = [ids_of(stream.next_item()) for _ in range(581)]
    assert again != whole and sorted(again[:-1]) == sorted(whole[:-1])


@pytest.mark.parametrize("capacity", [None, 256])
@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_from_any_place_is_never_having_stopped(
    file: Path, capacity: int | None, workers: int
) -> None:
    source = source_of(file, buffer_size=100)
    unbroken = stream_of(source, capacity=capacity)
    count = 700 if capacity is None else 300  # more than a pass
    items, places = [], [asdict(unbroken.position)]
    for _ in range(count):
        items.append(ids_of(unbroken.next_item()))
        places.append(json.loads(json.dumps(asdict(unbroken.position))))
    assert None in items
    for stop in (0, 1, 127, 128, 200, items.index(None), items.index(None) + 1, count - 5):
        resumed = stream_of(source, capacity=capacity, workers=workers, position=Position(**places[stop]))
        following = [ids_of(resumed.next_item()) for _ in range(min(150, count - stop))]
        assert following == items[stop : stop + len(following)]
        assert asdict(resumed.position) == places[stop + len(following)]
        resumed.close()


def test_packs_of_a_stream_are_full(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "rows.jsonl", chats(3000, mean=4.0)))
    stream, fills = stream_of(source, capacity=1024), []
    while (item := stream.next_item()) is not None:
        tokens = sum(row.num_tokens for row in item)
        assert tokens <= 1024
        fills.append(tokens / 1024)
    assert stream.read == 3000 and not stream.dropped
    assert np.mean(fills) >= 0.95


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("capacity", [None, 256])
def test_a_step_holds_the_same_rows_in_any_layout(
    file: Path, capacity: int | None, micro: int, accumulation: int, world: int
) -> None:
    def steps(micro: int, accumulation: int, world: int) -> Iterator[Any]:
        feeds = [
            StreamFeed(
                stream_of(source_of(file, buffer_size=100), capacity=capacity),
                micro_batch_size=micro,
                accumulation=accumulation,
                data_world=world,
            )
            for _ in range(world)
        ]
        for step in range(80 if capacity is None else 30):
            batches = [batch for rank, feed in enumerate(feeds) for batch in feed.batches(step, rank)]
            rows = [
                tuple(b.input_ids[b.segment_ids == s].tolist())
                for b in batches
                for s in range(b.num_segments)
            ]
            yield sorted(rows)

    expected = list(steps(8, 1, 1))
    assert list(steps(micro, accumulation, world)) == expected
    if capacity is None:  # 580 rows: the last step of the first pass is smaller
        assert [len(rows) for rows in expected[71:74]] == [8, 4, 8]


def test_a_stream_without_a_row_that_can_be_used_ends(tmp_path: Path) -> None:
    bad = stream_of(source_of(write(tmp_path / "bad.jsonl", [{"nothing": 1}] * 300)))
    with pytest.raises(ConfigError, match=r"none of the training rows can be used: no column with a conv"):
        bad.next_item()
    with pytest.raises(ConfigError, match="there are no training rows"):
        stream_of(source_of(write(tmp_path / "empty.jsonl", []))).next_item()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_line_that_is_not_json_is_told_with_its_place(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "rows.jsonl", chats(130))
    path.write_text(path.read_text() + "{broken\n")
    stream = stream_of(source_of(path), workers=workers)
    with pytest.raises(ConfigError, match=r"rows.jsonl line 131: not valid JSON"):
        for _ in range(131):
            stream.next_item()
    stream.close()


def test_the_fingerprint_sees_what_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", chats(20))
    before = source_of(path, buffer_size=5)
    assert before.fingerprint == source_of(path, buffer_size=5).fingerprint
    others = [source_of(path, buffer_size=6), source_of(f"{path}#19", buffer_size=5)]
    assert before.fingerprint not in [other.fingerprint for other in others]
    first = before.fingerprint
    write(path, [*chats(19), {"query": "a", "response": "b"}])
    assert source_of(path, buffer_size=5).fingerprint != first


def test_the_head_is_parsed_and_in_the_order_of_the_files(file: Path) -> None:
    rows = source_of(file, buffer_size=50, columns={"query": "question"}).head(3)
    assert [row.line for row in rows] == [1, 2, 3]
    assert rows[0].columns["question"] == "question 0"
