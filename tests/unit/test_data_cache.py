"""Encoded rows on disk: the same as in memory, found again, and never when anything has changed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from template_families import family_template

from swift.config.data import DataConfig
from swift.config.option import ConfigError
from swift.data import cache
from swift.data.cache import (
    copy_entries,
    describe_encoder,
    encode_cached,
    join_datasets,
    open_entry,
    open_exported,
    remember,
    write_entry,
)
from swift.data.encode import EncodedDataset, Encoder, EncodeReport, encode_rows
from swift.data.rows import Rows
from swift.data.sources import open_rows, split_rows


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "encoded"


def write(path: Path, *columns: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in columns))
    return path


WEIGHTED = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_scale": 2.0}]
}


def good(count: int) -> list[dict[str, Any]]:
    return [{"query": f"q{i}", "response": f"a{i}" * (i % 5 + 1)} for i in range(count)]


def rows_of(path: Path, spec: str = "", **options: Any) -> Rows:
    return open_rows([f"{path}{spec}"], **{"seed": 42, "shuffle": True, "columns": {}} | options)


def encode(rows: Rows, family: str = "smollm2", **flags: Any) -> tuple[EncodedDataset, EncodeReport]:
    plugins = flags.pop("plugins", ())
    template_flags = {key: flags.pop(key) for key in ("loss_scale", "system") if key in flags}
    config = DataConfig(**flags)
    encoder = Encoder(family_template(family, **template_flags), 120, strict=config.strict)
    return encode_cached(rows, encoder, config, plugins=plugins)


def entries(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir() if entry.is_dir()}


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "encode_chunks", lambda *_: pytest.fail("encoded again"))


def test_mapped_rows_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"query": "q", "response": "word " * 200}
    path = write(tmp_path / "f.jsonl", *good(5), {"foo": 1}, WEIGHTED, long, *good(3))
    encoder = Encoder(family_template("smollm2"), 120)
    expected, expected_report = encode_rows(rows_of(path), encoder, DataConfig())
    first, report = encode(rows_of(path))
    forbid_encoding(monkeypatch)
    again, report_again = encode(rows_of(path))
    for dataset in (first, again):
        assert isinstance(dataset.ids, np.memmap)
        assert (len(dataset), dataset.num_tokens, dataset.num_trained) == (
            len(expected), expected.num_tokens, expected.num_trained,
        )  # fmt: skip
        assert dataset.fingerprint == expected.fingerprint
        assert EncodedDataset.fingerprint.func(dataset) == expected.fingerprint  # type: ignore[attr-defined]
        for i in range(len(expected)):
            for field in dataclasses.fields(expected[i]):
                found, wanted = getattr(dataset[i], field.name), getattr(expected[i], field.name)
                assert found.tolist() == wanted.tolist()
        assert list(dataset.places) == list(expected.places)
        assert dataset.samples[-1] == expected.samples[-1]
    assert report == report_again == expected_report
    assert report.dropped["longer than --max_length 120"] == [(str(path), 8)]


def test_another_key_for_everything_that_matters(tmp_path: Path, cache_root: Path) -> None:
    path = write(tmp_path / "f.jsonl", *good(9))
    encode(rows_of(path))
    count = 1
    plugin = tmp_path / "plugin.py"
    plugin.write_text("")
    for spec, options, flags in (
        ("#4", {}, {}),
        ("#4", {"seed": 1}, {}),
        ("#4", {"shuffle": False}, {}),
        ("", {"columns": {"query": "prompt"}}, {}),
        ("", {}, {"system": "Be short."}),
        ("", {}, {"loss_scale": "all"}),
        ("", {}, {"family": "qwen2.5"}),
        ("", {}, {"plugins": (str(plugin),)}),
    ):
        encode(rows_of(path, spec, **options), **flags)
        count += 1
        assert len(entries(cache_root)) == count, (spec, options, flags)
    encode(rows_of(path, seed=1), dataset_num_proc=2, max_drop_ratio=0.5)  # none of these matters
    assert len(entries(cache_root)) == count
    write(path, *good(8))
    dataset, _ = encode(rows_of(path))
    assert len(entries(cache_root)) == count + 1
    assert len(dataset) == 8


def test_split_rows_have_entries_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "f.jsonl", *good(20))
    sizes = [len(encode(rows)[0]) for rows in split_rows(rows_of(path), 0.2, 1) if rows is not None]
    assert sizes == [16, 4]
    forbid_encoding(monkeypatch)
    assert [len(encode(rows)[0]) for rows in split_rows(rows_of(path), 0.2, 1) if rows is not None] == sizes


@pytest.mark.parametrize("name", ["entry.json", "ids.bin", "rows.npy"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_damaged_entries_are_made_anew(tmp_path: Path, cache_root: Path, name: str, damage: str) -> None:
    rows = rows_of(write(tmp_path / "f.jsonl", *good(9)))
    fingerprint = encode(rows)[0].fingerprint
    [entry] = entries(cache_root)
    file = cache_root / entry / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-3])
    assert open_entry(cache_root / entry) is None
    assert encode(rows)[0].fingerprint == fingerprint
    assert file.read_bytes() == content


def test_left_overs_of_a_killed_process_are_ignored(tmp_path: Path, cache_root: Path) -> None:
    rows = rows_of(write(tmp_path / "f.jsonl", *good(9)))
    encode(rows)
    [entry] = entries(cache_root)
    (cache_root / entry).rename(cache_root / f".{entry}.tmp")
    assert len(encode(rows)[0]) == 9
    assert entries(cache_root) == {entry}


def test_cache_can_be_switched_off(tmp_path: Path, cache_root: Path) -> None:
    rows = rows_of(write(tmp_path / "f.jsonl", *good(9)))
    before, _ = encode(rows)
    [entry] = entries(cache_root)
    stamp = (cache_root / entry / "ids.bin").stat().st_ino
    encode(rows)
    assert (cache_root / entry / "ids.bin").stat().st_ino == stamp
    after, _ = encode(rows, load_from_cache_file=False)
    assert (cache_root / entry / "ids.bin").stat().st_ino != stamp
    assert before[3].input_ids.tolist() == after[3].input_ids.tolist()  # what is mapped stays readable


def test_limits_hold_for_cached_rows_as_well(tmp_path: Path, cache_root: Path) -> None:
    path = write(tmp_path / "f.jsonl", *good(9), {"foo": 1})
    for _ in range(2):
        with pytest.raises(ConfigError, match="1 of 10 training rows cannot be used"):
            encode(rows_of(path), max_drop_ratio=0.0)
        assert entries(cache_root) == set()
    encode(rows_of(path))
    with pytest.raises(ConfigError, match="1 of 10 training rows cannot be used"):
        encode(rows_of(path), max_drop_ratio=0.0)
    with pytest.raises(ConfigError, match="line 10: no column with a conversation"):
        encode(rows_of(path), strict=True)


def export(directory: Path, rows: Rows, family: str = "smollm2") -> None:
    encoder = Encoder(family_template(family), 120)
    about = {**describe_encoder(encoder), "model": family}
    write_entry(directory, encoder, rows, DataConfig(), what="training", about=about)


def test_exported_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", *good(9))
    export(tmp_path / "a" / "train", rows_of(path))
    export(tmp_path / "a" / "val", rows_of(path, "#2"))
    export(tmp_path / "b" / "train", rows_of(path, "#3"))

    def opened(*names: str, family: str = "smollm2", length: int = 120, **flags: Any) -> list[EncodedDataset]:
        training = flags.pop("training", True)
        encoder = Encoder(family_template(family, **flags), length)
        directories = [str(tmp_path / name) for name in names]
        return open_exported(directories, encoder, model=family, training=training)

    several = opened("a", "b", "b/train")
    joined = join_datasets(several)
    assert [len(dataset) for dataset in several] == [9, 3, 3]
    assert len(joined) == 15
    assert joined[10].labels.tolist() == several[1][1].labels.tolist()
    assert joined.places[10] == several[1].places[1]
    assert join_datasets(several).fingerprint == joined.fingerprint
    with pytest.raises(ConfigError, match="tokenizer and chat template of smollm2, which differ"):
        opened("a", family="qwen2.5")
    with pytest.raises(ConfigError, match="--loss_scale is all, but"):
        opened("a", loss_scale="all")
    with pytest.raises(ConfigError, match="more than --max_length 5"):
        opened("a", length=5)
    with pytest.raises(ConfigError, match="no encoded rows in it"):
        opened("c")


def test_copies_keep_weights(tmp_path: Path) -> None:
    plain, _ = encode(rows_of(write(tmp_path / "f.jsonl", *good(3))))
    heavy, _ = encode(rows_of(write(tmp_path / "g.jsonl", WEIGHTED)))
    copy_entries(tmp_path / "both", [plain, heavy], {})
    both, report = open_entry(tmp_path / "both") or pytest.fail("not readable")
    assert (report.total, report.kept) == (4, 4)
    assert both[0].loss_scale.tolist() == [1.0] * len(plain[0].input_ids)
    assert both[3].loss_scale.tolist() == heavy[0].loss_scale.tolist()


def test_what_follows_from_rows_is_remembered_with_them(tmp_path: Path) -> None:
    dataset, _ = encode(rows_of(write(tmp_path / "f.jsonl", *good(3))))
    assert remember(dataset, "note", lambda: ["first"]) == ["first"]
    assert remember(dataset, "note", lambda: ["second"]) == ["first"]


def test_rows_of_a_moved_file_are_named_by_where_it_is(tmp_path: Path, cache_root: Path) -> None:
    rows = [*good(2), {"messages": []}, *good(3)]
    first, second = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows)
    _, before = encode(rows_of(first), max_drop_ratio=1.0)
    dataset, report = encode(rows_of(second), max_drop_ratio=1.0)
    assert len(entries(cache_root)) == 1
    assert [place for places in before.dropped.values() for place in places] == [(str(first), 3)]
    assert [place for places in report.dropped.values() for place in places] == [(str(second), 3)]
    assert [dataset.places[i] for i in (0, 4)] == [(str(second), 1), (str(second), 6)]
