"""`swift dataset`: one row of each family, broken rows and duplicates; what is said, and the HTML file."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from swift.cli.main import run as run_command

LONG = "I am swift-robot, an assistant made by swift, and a day has 24 hours"
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
EVIL = "<script>alert(1)</script> & \x1b[31m"
ROWS: list[object] = [
    {
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": f"{LONG} {EVIL}"},
        ]
    },
    {
        "conversations": [
            {"from": "human", "value": "What is tea?"},
            {"from": "gpt", "value": f"A drink. {LONG}"},
        ]
    },
    {"conversations": [{"human": "What is coffee?", "assistant": f"Roasted beans. {LONG}"}]},
    {"instruction": "Translate to French.", "input": "tea", "output": "thé"},
    {"query": "How many hours?", "response": f"<think>24</think>24. {LONG}"},
    {
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "21 C", "tool_call_id": "1"},
            {"role": "assistant", "content": "It is 21 degrees."},
        ],
        "tools": [TOOL],
    },
    '{"query": "broken',
    [1, 2],
    {"foo": "bar"},
    {"query": "How many hours?", "response": f"<think>24</think>24. {LONG}"},
    {"query": "What is tea", "response": f"a drink, {LONG}!"},
]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags that are balanced, the text, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.marked = ""
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data
        if "mark" in self.open:
            self.marked += data


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = tmp_path / "mix.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_inspect_names_every_row_that_is_wrong(data, tiny_llama_dir, capfd):
    command = [
        "dataset",
        "inspect",
        "mix.jsonl",
        "--model",
        str(tiny_llama_dir),
        "--json",
        "out/numbers.json",
    ]
    assert run_command([*command, "--max_length", "200"]) == 0
    out = capfd.readouterr().out
    numbers = json.loads(Path("out/numbers.json").read_text())
    assert (numbers["rows"], numbers["kept"]) == (11, 8)
    assert numbers["sources"] == {"mix.jsonl": 11}
    assert {(r["reason"], r["count"], *r["places"]) for r in numbers["dropped"]} == {
        ("not valid JSON", 1, "mix.jsonl:7"),
        ("not a JSON object but a list", 1, "mix.jsonl:8"),
        ("no column with a conversation (columns: foo)", 1, "mix.jsonl:9"),
    }
    assert numbers["copies"]["places"] == ["mix.jsonl:10 is mix.jsonl:5"]
    assert numbers["near_duplicates"]["places"] == ["mix.jsonl:11 is mix.jsonl:2"]
    assert numbers["turns"] == {"1": 7, "2": 1}
    assert numbers["thoughts"] == {"with thoughts": 2, "with empty thoughts": 0, "without": 6}
    assert sum(numbers["question_lengths"].values()) == 8 and sum(numbers["answer_lengths"].values()) == 9
    assert numbers["unended"]["count"] == numbers["ends_with_question"]["count"] == 0
    assert numbers["too_long"]["places"] == ["mix.jsonl:6"]
    assert [t["rows_dropped"] for t in numbers["truncation"] if t["strategy"] == "delete"] == [1]
    assert 0.1 < numbers["trained_share"] < 0.9
    for words in (
        "mix.jsonl:7",
        "not valid JSON",
        "mix.jsonl:10 is mix.jsonl:5",
        "warning: 3 of 11 rows cannot",
    ):
        assert words in out
    assert "\x1b" not in out, "plain where it is no terminal"
    html = Path("output/dataset/mix-inspect.html").read_text()
    page = Page(html)
    assert "svg" in page.tags and "script" not in page.tags and page.addresses == []
    assert "prefers-color-scheme: dark" in html and "url(" not in html and len(html) < 30_000
    assert "mix.jsonl:10 is mix.jsonl:5" in page.text


def test_preview_marks_what_is_trained(data, tiny_llama_dir, capfd):
    command = ["dataset", "preview", "--dataset", "mix.jsonl", "--model", str(tiny_llama_dir)]
    assert run_command([*command, "--row", "1", "6", "7", "--report", "page.html"]) == 0
    out = capfd.readouterr().out
    assert f"⟦{LONG} <script>alert(1)</script> & " in out and "\x1b" not in out
    assert "mix.jsonl line 1 · " in out and "⟦It is 21 degrees.<|im_end|>⟧" in out
    assert "mix.jsonl line 7" in out and "not valid JSON" in out
    html = Path("page.html").read_text()
    page = Page(html)
    assert "script" not in page.tags and "&lt;script&gt;alert(1)" in html
    assert page.marked.startswith(f"{LONG} <script>alert(1)</script>")
    assert "Who are you?" in page.text and "Who are you?" not in page.marked
    assert not Path("output").exists()


def test_preview_picks_the_same_rows_for_the_same_seed(data, tiny_llama_dir, capfd):
    said = []
    for seed in ("1", "1", "2"):
        command = ["dataset", "preview", "mix.jsonl#6", "--model", str(tiny_llama_dir), "--num_rows", "2"]
        assert run_command([*command, "--dataset_shuffle", "false", "--data_seed", seed]) == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].count(" tokens, ") == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["look", "mix.jsonl"], "--action must be one of inspect, preview, got look"),
        (["inspect"], "no dataset is named"),
        (["inspect", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["preview", "mix.jsonl", "--row", "99"], "--row 99: there are 11 rows"),
        (["preview", "mix.jsonl", "--row", "0"], "--row counts from 1"),
        (["inspect", "mix.jsonl", "--report", "."], ". is a directory"),
        (["inspect", "bad.jsonl"], "none of the 1 inspected rows can be used: 1 not valid JSON"),
    ],
)
def test_mistakes(data, tiny_llama_dir, capfd, argv, words):
    Path("bad.jsonl").write_text("{\n")
    assert run_command(["dataset", *argv, "--model", str(tiny_llama_dir)]) == 2
    assert words in capfd.readouterr().err
    assert not list(Path().rglob("*.html"))


def test_training_says_it_too(data, tiny_llama_dir, capfd):
    rows = [{"query": f"How many hours has day {i}?", "response": "24"} for i in range(4)]
    Path("short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    command = ["sft", "--model", str(tiny_llama_dir), "--dataset", "short.jsonl", "--max_steps", "1"]
    assert run_command([*command, "--save_strategy", "no", "--output_dir", "out"]) == 0
    said = capfd.readouterr().err
    assert "warning: answers are very short: half of them have at most 1 token(s)" in said
    assert (
        "1 of 5 rows are exact copies of another row (first: short.jsonl line 5 is short.jsonl line 1)"
        in said
    )
