"""The syntax of --dataset, files of every kind, #N, --columns, the split, the packaged data sets."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from swift.config.option import ConfigError
from swift.data.rows import InMemory, Rows
from swift.data.sources import Spec, mix_tables, open_rows, parse_spec, sample_indices, split_rows
from swift.data.types import Row


def load(*specs: Any, **options: Any) -> list[Row]:
    options = {"seed": 42, "shuffle": False, "columns": {}} | options
    return list(open_rows([str(spec) for spec in specs], **options))


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def places(rows: list[Row]) -> list[tuple[str, int]]:
    return [(Path(row.file).name, row.line) for row in rows]


def test_spec_syntax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b#5", "c:d.jsonl"):
        write(tmp_path / name, "{}")
    assert parse_spec("a.jsonl") == Spec(Path("a.jsonl"), None, "a.jsonl", (), None)
    assert parse_spec("a.jsonl#12") == Spec(Path("a.jsonl"), None, "a.jsonl", (), 12)
    assert parse_spec("b#5").count is None
    assert parse_spec("b#5#3") == Spec(Path("b#5"), None, "b#5", (), 3)
    assert parse_spec("c:d.jsonl#1").path == Path("c:d.jsonl")
    assert parse_spec("x/y:s1/s2#600") == Spec(None, None, "x/y", ("s1", "s2"), 600)
    assert parse_spec("hf::x/y") == Spec(None, "hf", "x/y", (), None)
    assert parse_spec("ms::x/y:s").subsets == ("s",)
    with pytest.raises(ConfigError, match="#0 takes no rows"):
        parse_spec("a.jsonl#0")


def test_sampling() -> None:
    assert sample_indices(range(3), count=7, seed=1, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]
    assert sample_indices(range(5), count=2, seed=1, shuffle=False) == [0, 1]
    # The numbers are frozen: a data set must not change under a run that is resumed years later.
    assert sample_indices(range(10), count=4, seed=42, shuffle=True) == [8, 1, 5, 0]
    assert sample_indices(range(3), count=7, seed=42, shuffle=True) == [0, 1, 2, 0, 1, 2, 0]
    assert sorted(sample_indices(range(6), count=6, seed=0, shuffle=True)) == list(range(6))


def test_rows_of_any_shape_keep_their_place(tmp_path: Path) -> None:
    lines = ['{"a": 1}', "", '{"a": "text", "b": {"c": [null, 1.5]}}', "  ", '{"z": []}']
    rows = load(write(tmp_path / "x.jsonl", "\n".join(lines)))
    assert [row.columns for row in rows] == [{"a": 1}, {"a": "text", "b": {"c": [None, 1.5]}}, {"z": []}]
    assert places(rows) == [("x.jsonl", 1), ("x.jsonl", 3), ("x.jsonl", 5)]


def test_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    rows = load(write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"a": "\xe4\xbd\xa0"}\r\n{"a": 2}\r\n'))
    assert [row.columns for row in rows] == [{"a": "你"}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1},\n {"a": 2}]\n', [1, 2]),
        ('\n[\n{"a": 1}\n,\n{"a":\n2}]', [3, 5]),
        ('{"a": 1}\n{"a": 2}\n', [1, 2]),
        ('{\n"a": 1\n}\n\n{"a": 2}', [1, 5]),
    ],
)
def test_json_list_or_objects(tmp_path: Path, text: str, expected: list[int]) -> None:
    rows = load(write(tmp_path / "x.json", text))
    assert [row.columns["a"] for row in rows] == [1, 2]
    assert [row.line for row in rows] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl line 2: not valid JSON (Expecting value, column 6)"),
        ("x.jsonl", '{"a": 1}\n[1]\n', "x.jsonl line 2: not a JSON object but a list"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl line 2: not UTF-8"),
        ("x.json", '[{"a": 1},\n{"a": }]', "x.json line 2: not valid JSON (Expecting value"),
        (
            "x.json",
            '[{"a": 1}\n{"a": 2}]',
            "x.json line 2: not valid JSON (the list is not closed, or a comma",
        ),
        ("x.json", '[{"a": 1},\n', "x.json line 2: not valid JSON (the list is not closed"),
        ("x.json", '[{"a": 1}]\n]', "x.json line 2: not valid JSON (text after the end"),
        ("x.json", "[1]", "x.json line 1: not a JSON object but a number"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", "x.csv row 2: more fields than the header has"),
        ("x.csv", b"a\n\xff\n", "x.csv: not UTF-8"),
        ("x.parquet", b"no", "x.parquet: not a readable Parquet file"),
        ("x.jsonl", "", "x.jsonl: no rows in it"),
        ("x.json", "[]", "x.json: no rows in it"),
        ("x.json", "", "x.json: no rows in it"),
        ("x.csv", "a,b\n", "x.csv: no rows in it"),
        ("x.docx", "text", "x.docx: cannot read .docx"),
        ("folder/readme.md", "text", "folder: no .jsonl, .json, .csv, .parquet file in this folder"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    write(tmp_path / name, text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name.split("/")[0])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_text_and_parquet(tmp_path: Path) -> None:
    long = "x" * 200_000
    rows = load(write(tmp_path / "x.csv", f'query,response\n"a, ""b""\nc",\nq,{long}\n'))
    assert [row.columns for row in rows] == [
        {"query": 'a, "b"\nc', "response": ""},
        {"query": "q", "response": long},
    ]
    assert places(rows) == [("x.csv", 1), ("x.csv", 2)]
    rows = load(write(tmp_path / "x.txt", "one\n\ntwo\r\n"))
    assert [(row.columns, row.line) for row in rows] == [({"text": "one"}, 1), ({"text": "two"}, 3)]
    table = pyarrow.Table.from_pylist([{"m": [{"role": "user"}]}, {"m": None}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    rows = load(tmp_path / "x.parquet")
    assert [(row.columns, row.line) for row in rows] == [({"m": [{"role": "user"}]}, 1), ({"m": None}, 2)]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "swift.data.parquet", raising=False)
    with pytest.raises(ConfigError, match="needs the package pyarrow") as caught:
        load(write(tmp_path / "x.parquet", b""))
    assert caught.value.hint == "pip install 'swiftune[parquet]'"


def test_folder_of_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.json", ".hidden/x.jsonl", "readme.txt"):
        write(tmp_path / name, '{"a": 1}')
    write(tmp_path / "dataset_infos.json", '{"info": 1}')
    assert places(load(tmp_path)) == [("b.jsonl", 1), ("a.json", 1)]
    for name in ("train-1.jsonl", "test-1.jsonl", "validation.jsonl"):
        write(tmp_path / name, '{"a": 1}')
    assert places(load(tmp_path)) == [("b.jsonl", 1), ("a.json", 1), ("train-1.jsonl", 1)]


def test_several_specs_with_counts(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", '{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    two = write(tmp_path / "two.jsonl", '{"b": 1}\n')
    assert places(load(f"{one}#2", f"{two}#3")) == [
        ("one.jsonl", 1),
        ("one.jsonl", 2),
        *[("two.jsonl", 1)] * 3,
    ]
    alone, beside = load(f"{one}#2", shuffle=True), load(two, f"{one}#2", shuffle=True)
    assert beside[1:] == alone


def test_missing_file_and_near_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl", "{}")
    for name in ("trian.jsonl", "trian.jsonl#5"):
        with pytest.raises(ConfigError, match="no such file or folder") as caught:
            load(tmp_path / name)
        assert caught.value.hint == f"did you mean {tmp_path / 'train.jsonl'}?"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "gone" / "train.jsonl")
    assert caught.value.hint == f"the folder {tmp_path / 'gone'} does not exist"


@pytest.mark.parametrize(
    ("spec", "package", "hub"),
    [("owner/name#5", "modelscope_hub", "ModelScope"), ("hf::owner/name:x", "datasets", "HuggingFace")],
)
def test_hub_id_without_the_package(
    monkeypatch: pytest.MonkeyPatch, spec: str, package: str, hub: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for module in ("swift.data.hub_ms", "swift.data.hub_hf"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        load(spec)
    assert f"dataset {spec}: no such file, and taking it from {hub} needs the package {package}" in str(
        caught.value
    )
    assert caught.value.hint == "pip install 'swiftune[hub]'"


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_OFFLINE", "1")
    with pytest.raises(ConfigError, match="downloads are switched off"):
        load("owner/name")


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        NAME = "the hub"

        @staticmethod
        def load(*arguments: Any) -> list[dict[str, Any]]:
            if arguments[1] == "gone":
                raise OSError("404")
            asked.append(arguments)
            return [{"a": arguments[1]}]

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "swift.data.hub_hf", Hub)
    assert [row.columns["a"] for row in load("owner/name:s1/s2#3", use_hf=True, token="t")] == [
        "s1",
        "s2",
        "s1",
    ]
    assert asked == [("owner/name", "s1", "t"), ("owner/name", "s2", "t")]
    with pytest.raises(ConfigError, match=r"owner/name:gone: not found .* on the hub \(OSError: 404\)"):
        load("owner/name:gone", use_hf=True)


def test_columns_are_renamed_first(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", '{"a": 1, "b": 2}\n{"b": 3}\n{"c": 4}\n')
    rows = load(file, columns={"b": "a"})
    assert [row.columns for row in rows] == [{"a": 2}, {"a": 3}, {"c": 4}]
    assert load(file, columns={"old": "c"}) == load(file)
    with pytest.raises(ConfigError, match="--columns renames bb, which no row has") as caught:
        load(file, columns={"bb": "x"})
    assert caught.value.hint == "did you mean b?"


def numbered(count: int) -> list[Row]:
    return [Row({"i": i}, "f", i + 1) for i in range(count)]


def split(rows: list[Row], ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    training, held_out = split_rows(Rows([InMemory(rows)]), ratio, seed)
    return list(training), list(held_out or ())


def test_split_depends_on_content_and_seed_alone() -> None:
    rows = numbered(50)
    training, held_out = split(rows, 0.1, 42)
    assert (len(training), len(held_out)) == (45, 5)
    assert sorted(row.line for row in training + held_out) == list(range(1, 51))
    assert [row.line for row in training] == sorted(row.line for row in training)
    _, again = split(rows[::-1], 0.1, 42)
    assert {row.line for row in again} == {row.line for row in held_out}
    assert split(rows, 0.1, 43)[1] != held_out
    assert split(rows, 0, 42) == (rows, [])
    assert len(split(rows, 0.001, 42)[1]) == 1


def test_repeated_rows_are_never_on_both_sides() -> None:
    training, held_out = split([row for row in numbered(6) for _ in range(5)], 0.2, 0)
    assert {row.line for row in training}.isdisjoint(row.line for row in held_out)
    assert len(held_out) == 10  # whole groups of 5, until 6 are reached
    with pytest.raises(ConfigError, match="the rows are all the same, none can be held out"):
        split(numbered(1) * 4, 0.5, 0)


def test_mixing_by_weights() -> None:
    first = mix_tables([40, 1000], weights=[3, 1], seed=7, stop="first_exhausted")
    assert first.tolist() == mix_tables([40, 1000], weights=[3, 1], seed=7, stop="first_exhausted").tolist()
    assert first[-1] == 39  # the end of the table that is used up
    assert sorted(first[first < 40]) == list(range(40))
    assert first[first >= 40].tolist() == list(range(40, 40 + len(first) - 40))
    everything = mix_tables([40, 1000], weights=[3, 1], seed=7, stop="all_exhausted")
    assert everything[-1] == 1039
    assert sorted(everything[everything >= 40]) == list(range(40, 1040))
    small = everything[everything < 40]
    assert small.tolist() == [i % 40 for i in range(len(small))]
    assert 0.7 < len(small) / len(everything) < 0.8
    assert first.tolist() != mix_tables([40, 1000], weights=[3, 1], seed=8, stop="first_exhausted").tolist()


def test_mixed_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", "".join(f'{{"i": {i}}}\n' for i in range(30)))
    specs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl#10")]
    rows = open_rows(specs, seed=1, shuffle=False, columns={"i": "j"}, mix=(0.5, 0.5))
    found = places(list(rows))
    assert [line for name, line in found if name == "b.jsonl"] == list(range(1, 11))
    assert found[-1] == ("b.jsonl", 10)
    assert rows[0].columns == {"j": 0}
    assert rows.digest != open_rows(specs, seed=2, shuffle=False, columns={"i": "j"}, mix=(0.5, 0.5)).digest


def test_rows_are_read_when_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '\ufeff{"i": 0}\r\n\n  \n{"i": 1}\nbroken\n{"i": 3}')
    rows = open_rows([f"{path}"], seed=1, shuffle=False, columns={})
    assert len(rows) == 4
    assert [(row.columns["i"], row.line) for row in (rows[0], rows[1], rows[-1])] == [(0, 1), (1, 4), (3, 6)]
    with pytest.raises(ConfigError, match="line 5: not valid JSON"):
        list(rows)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="changed while it was read"):
        rows.check_unchanged()


@pytest.mark.parametrize("dataset", ["swift/self-cognition", "modelscope/self-cognition"])
def test_self_cognition(dataset: str) -> None:
    rows = load(dataset, model_name=("zh-name", "swift-robot"), model_author=("swift",))
    assert len(rows) == 100
    assert (rows[0].columns["query"], rows[0].columns["tag"]) == ("Who are you?", "en")
    assert (
        rows[0].columns["response"].startswith("I am swift-robot, an AI assistant developed by swift. I can")
    )
    assert "{{" not in json.dumps([row.columns for row in rows])
    assert (rows[0].file, rows[0].line) == (dataset, 1)


def test_self_cognition_subsets() -> None:
    names = {"model_name": ("n",), "model_author": ("a",)}
    qwen3 = load("swift/self-cognition:qwen3#1", **names)[0].columns
    assert qwen3["query"] == "Who are you? /no_think"
    assert qwen3["response"].startswith("<think>\n\n</think>\n\nI am n,")
    both = load("swift/self-cognition:default/empty_think", **names)
    assert len(both) == 200
    assert both[100].columns["query"] == "Who are you?"
    assert both[100].columns["response"].startswith("<think>\n\n</think>\n\n")
    assert len(load("swift/self-cognition:all", **names)) == 300
    with pytest.raises(ConfigError, match="has no subset qwen4"):
        load("swift/self-cognition:qwen4", **names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_author": ("a",)}, "--model_name is missing"),
        ({"model_name": ("n",)}, "--model_author is missing"),
        ({"model_name": ("n", ""), "model_author": ("a",)}, "--model_name is missing"),
        ({"model_name": ("n", "n", "n"), "model_author": ("a",)}, "--model_name takes one value, or two"),
    ],
)
def test_self_cognition_without_names(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("swift/self-cognition", **given)


def test_general_set_needs_no_names() -> None:
    rows = load("swift/general")
    assert len(rows) == 48
    assert rows[0].columns["response"] == "The capital of Italy is Rome."
    assert load("swift/general", model_name=("n",)) == rows
