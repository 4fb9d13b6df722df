"""Files of users: how they are run, what they register, and how their mistakes are told."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swift.config.option import ConfigError
from swift.config.plugins import PluginConfig
from swift.data import datasets, sources
from swift.data.datasets import DatasetMeta, SubsetDataset, register_dataset, use_plugins
from swift.data.formats import to_sample
from swift.data.preference import to_prompt
from swift.data.preprocessors import AlpacaPreprocessor, MessagesPreprocessor, ResponsePreprocessor
from swift.data.sources import open_rows
from swift.data.types import Row, RowError
from swift.plugins.hooks import ORM, orms
from swift.plugins.registry import Registry, load_file, load_object, load_plugins

COUNTDOWN = Path(__file__).parents[1] / "data" / "countdown.py"
ROWS = [{"nums": [1, 2, 3], "target": 6}, {"nums": [4, 5], "target": 20}]
OPTIONS = {"seed": 1, "shuffle": False, "columns": {}}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test registers or loads outlives it."""
    monkeypatch.setattr(datasets, "_REGISTERED", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules, rewards = set(sys.modules), dict(orms)
    yield
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if "site-packages" not in file and "swift" not in name:
            del sys.modules[name]
    orms.clear()
    orms.update(rewards)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_rows(path: Path, rows: list[dict]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_importing_swift_and_its_old_paths_is_light() -> None:
    code = (
        "import sys, swift; light = set(sys.modules); import swift.plugin, swift.rewards, swift.llm;"
        "from swift import register_dataset, ORM; import swift.dataset;"
        "assert all(getattr(swift.dataset, n) is getattr(swift.llm, n) for n in swift.llm.__all__);"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'modelscope'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert not [n for n in light if n.startswith('swift.')];"
        "assert swift.rewards.orms is swift.plugin.orms and ORM is swift.plugin.ORM"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(ImportError, match="nothing_here"):
        from swift import nothing_here
    with pytest.raises(ImportError, match="nothing_here"):
        from swift.dataset import nothing_here  # noqa: F401


def test_users_plugin_loads_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plugins(PluginConfig(external_plugins=(str(COUNTDOWN), str(COUNTDOWN))))
    asked = []

    def load(text: str, spec: sources.Spec, *, use_hf: bool, token: str | None) -> list[Row]:
        asked.append((spec.hub, spec.dataset_id, spec.subsets))
        return [Row(row, "hub", number) for number, row in enumerate(ROWS, start=1)]

    monkeypatch.setattr(sources, "_load_from_hub", load)
    rows = list(open_rows(["zouxuhong/Countdown-Tasks-3to4#3"], **OPTIONS))
    assert asked == [("ms", "zouxuhong/Countdown-Tasks-3to4", ())]
    assert [row.columns["target"] for row in rows] == [6, 20, 6]
    assert sorted(rows[0].columns) == ["messages", "nums", "target"]
    prompt = to_prompt(rows[0])
    assert prompt.sample.messages[0]["content"].startswith(
        "Using the numbers [1, 2, 3], create an equation that"
    )
    assert prompt.sample.extra == {"nums": [1, 2, 3], "target": 6} and prompt.answer is None
    reward = orms.find("external_countdown")()
    assert isinstance(reward, ORM)
    answers = ["<answer>1+2+3</answer>", "<answer>1+2</answer>"]
    assert reward(answers, target=[6, 6], nums=[[1, 2, 3]] * 2) == [1.0, 0.0]


def test_registered_path_and_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Small(ResponsePreprocessor):
        def preprocess(self, row: dict) -> dict | None:
            return super().preprocess({**row, "query": str(row["nums"])}) if row["response"] < 10 else None

    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    register_dataset(DatasetMeta(dataset_name="small", dataset_path=path, preprocess_func=Small()))
    for name in ("small", path):
        rows = list(open_rows([name], **OPTIONS))
        assert [message["content"] for message in rows[0].columns["messages"]] == ["[1, 2, 3]", "6"]
        assert (rows[0].file, rows[0].line, len(rows)) == (path, 1, 1)
    assert "small: its preprocessor left out 1 of 2 rows" in capsys.readouterr().err


def test_row_that_a_preprocessor_cannot_read(tmp_path: Path) -> None:
    def broken(row: dict) -> dict:
        return {"query": row["missing"]}

    path = write_rows(tmp_path / "rows.jsonl", [{"missing": "q"}, {"other": 1}])
    register_dataset(DatasetMeta(dataset_path=path, preprocess_func=broken))
    good, bad = list(open_rows([path], **OPTIONS))
    assert to_sample(good).messages == ({"role": "user", "content": "q"},)
    with pytest.raises(RowError, match="fails: KeyError: 'missing'"):
        to_sample(bad)
    assert (bad.file, bad.line) == (path, 2)


@pytest.mark.parametrize(
    ("preprocessor", "row", "expected"),
    [
        (
            ResponsePreprocessor(columns={"q": "question"}),
            {"q": "x", "Answer": "y", "system_prompt": "s", "history": [["a", "b"]], "solution": "z"},
            {"messages": ["s", "a", "b", "x", "y"], "solution": "z"},
        ),
        (
            ResponsePreprocessor(),
            {"problem": "x", "solution": "y"},
            {"messages": ["x", "y"], "solution": "y"},
        ),
        (
            AlpacaPreprocessor(),
            {"instruction": "i", "input": "x", "output": "o", "id": 1},
            {"messages": ["i\nx", "o"], "id": 1},
        ),
        (
            MessagesPreprocessor(),
            {"conversations": [{"human": "q", "assistant": "a"}]},
            {"messages": ["q", "a"]},
        ),
    ],
)
def test_preprocessors(preprocessor: ResponsePreprocessor, row: dict, expected: dict) -> None:
    made = preprocessor.preprocess(preprocessor.prepare(row))
    assert made is not None
    assert {**made, "messages": [message["content"] for message in made["messages"]]} == expected


def test_where_a_registered_dataset_is() -> None:
    meta = DatasetMeta("ms/d", "hf/d", subsets=["default", SubsetDataset("zh", "chinese"), "en"])
    assert meta.source((), use_hf=False) == {"hub": "ms", "dataset_id": "ms/d", "subsets": ()}
    assert meta.source(("zh", "en"), use_hf=True) == {
        "hub": "hf",
        "dataset_id": "hf/d",
        "subsets": ("chinese", "en"),
    }
    assert DatasetMeta(hf_dataset_id="hf/d").source((), use_hf=False)["hub"] == "hf"
    with pytest.raises(ConfigError, match="dataset ms/d has no subset fr") as caught:
        meta.source(("fr",), use_hf=False)
    assert caught.value.hint == "known: default, zh, en, all"


def test_dataset_info_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"a": "x", "b": "y"}])
    entry = {"dataset_path": "rows.jsonl", "dataset_name": "mine", "columns": {"a": "query", "b": "response"}}
    info = write(tmp_path / "info.json", json.dumps([entry, {"hf_dataset_id": "o/d", "tags": ["x"]}]))
    use_plugins(PluginConfig(custom_dataset_info=(info,)))
    (row,) = list(open_rows(["mine"], **OPTIONS))
    assert row.columns == {"query": "x", "response": "y"}
    assert datasets.find_registered("o/d") is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "not a list of datasets"),
        ("[1]", "entry 1: not an object"),
        ('[{"hf_dataset_id": "o/d"}, {"hf_dataset": "o/d"}]', "entry 2: unknown key hf_dataset"),
        ('[{"dataset_name": "d"}]', "entry 1: dataset d does not say where its rows are"),
        (
            '[{"hf_dataset_id": "o/d", "split": ["test"]}]',
            "entry 1: dataset o/d: only the split train can be",
        ),
        ('[{"hf_dataset_id": "o/d", "subsets": [1]}]', "entry 1: a subset is a name"),
    ],
)
def test_mistakes_in_a_dataset_info_file(tmp_path: Path, text: str, message: str) -> None:
    info = write(tmp_path / "info.json", text)
    with pytest.raises(ConfigError) as caught:
        use_plugins(PluginConfig(custom_dataset_info=(info,)))
    assert (
        caught.value.message.startswith(f"--custom_dataset_info {info}") and message in caught.value.message
    )
    with pytest.raises(ConfigError, match=r"gone\.json: No such file"):
        use_plugins(PluginConfig(custom_dataset_info=(str(tmp_path / "gone.json"),)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n\nundefined_name\n", " line 3: NameError: name 'undefined_name' is not defined"),
        ("x = (\n", " line 1: SyntaxError: '(' was never closed"),
        ("def f():\n    raise KeyError('k')\nf()\n", " line 2: KeyError: 'k'"),
        (
            "from swift.llm import Nothing\n",
            " line 1: ImportError: cannot import name 'Nothing' from 'swift.llm'",
        ),
        (
            "from swift.llm import *\nregister_dataset(DatasetMeta())\n",
            " line 2: a registered dataset needs ms_dataset_id",
        ),
    ],
)
def test_mistake_in_a_plugin_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "users_plugin.py", text)
    with pytest.raises(ConfigError) as caught:
        load_plugins([file])
    assert caught.value.message.startswith(file + message)
    assert "users_plugin" not in sys.modules


def test_plugin_file_that_is_not_there_or_has_a_taken_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--external_plugins .*gone\.py: no such file"):
        load_plugins([str(tmp_path / "gone.py")])
    with pytest.raises(ConfigError, match=r"notes\.txt: no such Python file"):
        load_plugins([write(tmp_path / "notes.txt", "")])
    with pytest.raises(ConfigError, match="there is another module called json") as caught:
        load_plugins([write(tmp_path / "json.py", "")])
    assert caught.value.hint == "rename the file"
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(COUNTDOWN, other)
    load_plugins([str(COUNTDOWN)])
    with pytest.raises(ConfigError, match="another module called countdown"):
        load_plugins([str(other / "countdown.py")])


def test_plugins_may_import_each_other(tmp_path: Path) -> None:
    write(tmp_path / "plugin_helper.py", "VALUE = 7\n")
    file = write(tmp_path / "plugin_main.py", "from plugin_helper import VALUE\n")
    assert load_file(file).VALUE == 7
    assert load_file(file) is load_file(file)
    assert load_object(f"{file}:VALUE") == 7
    with pytest.raises(ConfigError) as caught:
        load_object(f"{file}:VALU")
    assert caught.value.hint == "did you mean VALUE?"


def test_registry() -> None:
    registry: Registry = Registry("reward", {"lazy": "json:dumps"})

    @registry.register("accuracy")
    def accuracy() -> None: ...

    registry["format"] = 1
    assert (registry.find("accuracy"), registry.find("format")) == (accuracy, 1)
    assert registry.find("lazy") is json.dumps and registry.find("json:loads") is json.loads
    with pytest.raises(ConfigError) as caught:
        registry.find("acuracy")
    assert caught.value.message == "no reward is called acuracy"
    assert caught.value.hint == "did you mean accuracy? known: accuracy, format, lazy"
    with pytest.raises(ConfigError, match="there is a reward called format already"):
        registry.register("format")(2)
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        registry.find("no_such_module:x")


def test_registered_twice(tmp_path: Path) -> None:
    register_dataset(DatasetMeta("o/d"))
    with pytest.raises(ConfigError, match="dataset o/d is registered already"):
        register_dataset(DatasetMeta("o/d"))
    register_dataset(DatasetMeta("o/d", tags=["new"]), exist_ok=True)
    assert datasets.find_registered("o/d").tags == ["new"]
