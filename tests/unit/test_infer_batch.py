"""Answers to the rows of files: order, what is written when, rows that cannot be used, figures."""

import json
from pathlib import Path

import pytest

from swift.config.generation import GenerationConfig, InferOptions
from swift.config.model import ModelConfig
from swift.config.option import ConfigError
from swift.config.template import TemplateConfig
from swift.data.formats import to_sample
from swift.data.preference import PromptSample
from swift.data.sources import open_rows
from swift.infer import batch
from swift.infer.batch import (
    Rejects,
    Stats,
    answer_rows,
    leave_out_answered,
    load_questions,
    mend_last_line,
    report,
    result_row,
)
from swift.infer.engine import Completion, TransformersInferEngine

GREEDY = GenerationConfig(temperature=0, max_new_tokens=5)
LONG = "The quick brown fox jumps over the lazy dog. " * 4


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(path: Path, **options) -> tuple[list[PromptSample], Rejects]:
    return load_questions([str(path)], InferOptions(dataset_shuffle=False, **options), seed=3, columns={})


def run(engine, path: Path, questions, rejects, *, sampling=GREEDY, **options) -> Stats:
    stats = Stats()
    left = [(number, questions[number]) for number in leave_out_answered(questions, path, stats)]
    settings = InferOptions(**options)
    answer_rows(engine, left, rejects, stats, options=settings, sampling=sampling, result_path=path)
    return stats


@pytest.fixture(scope="module")
def engine(tmp_path_factory, make_tiny_model_dir) -> TransformersInferEngine:
    path = make_tiny_model_dir(tmp_path_factory.mktemp("infer"), tie_word_embeddings=False)
    return TransformersInferEngine.load(
        path, model=ModelConfig(device="cpu"), template=TemplateConfig(max_length=400)
    )


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    seen: list[str] = []
    for name in ("say", "warn"):
        monkeypatch.setattr(batch, name, seen.append)
    return seen


@pytest.fixture
def questions_file(tmp_path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Who are you?"},
                {"role": "assistant", "content": "A robot."},
            ]
        },
        {"query": LONG, "response": "Indeed.", "solution": "42"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 + 5?"}]},
        {"query": "你是谁？"},
        {"query": LONG + LONG, "tag": "long"},
    ]
    return write_rows(tmp_path / "questions.jsonl", rows)


def test_a_final_answer_becomes_the_label_and_is_not_shown_to_the_model(questions_file) -> None:
    questions, _ = load(questions_file)
    assert [q.label for q in questions] == ["A robot.", "Indeed.", None, None, None]
    assert [q.sample.messages[-1]["role"] for q in questions] == ["user"] * 5
    assert [len(q.sample.messages) for q in questions] == [1, 1, 2, 1, 1]
    sample = questions[2].sample
    assert (sample.file, sample.line) == (str(questions_file), 3)


def test_rows_come_in_order_with_every_batch_size_and_window(engine, questions_file, tmp_path) -> None:
    questions, rejects = load(questions_file)
    alone = [engine.generate([q.sample.messages], GREEDY)[0].text for q in questions]
    assert len(set(alone)) > 2
    for number, (size, window) in enumerate([(1, 1), (2, 2), (5, 1000), (3, -1)]):
        path = tmp_path / f"{number}.jsonl"
        stats = run(engine, path, questions, rejects, max_batch_size=size, write_batch_size=window)
        assert [row["response"] for row in read_rows(path)] == alone
        assert (stats.num_samples, stats.num_generated_tokens, stats.num_cut) == (5, 25, 5)


def test_result_rows_have_the_schema_and_train(engine, questions_file, tmp_path) -> None:
    questions, rejects = load(questions_file)
    path = tmp_path / "result.jsonl"
    run(engine, path, questions, rejects)
    rows = read_rows(path)
    assert [list(row)[:4] for row in rows] == [["response", "labels", "logprobs", "messages"]] * 5
    assert rows[0]["labels"] == "A robot."
    assert rows[0]["logprobs"] is None
    assert rows[1]["solution"] == "42"
    assert rows[4]["tag"] == "long"
    again = [to_sample(row) for row in list(open_rows([str(path)], seed=0, shuffle=False, columns={}))]
    for question, sample, row in zip(questions, again, rows, strict=True):
        answer = {"role": "assistant", "content": row["response"]}
        assert list(sample.messages) == [*question.sample.messages, answer]


def test_answered_rows_can_be_answered_again(engine, questions_file, tmp_path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for source, target in ((questions_file, first), (first, second)):
        questions, rejects = load(source)
        run(engine, target, questions, rejects)
    for old, new in zip(read_rows(first), read_rows(second), strict=True):
        assert new["labels"] == old["response"] == new["response"]
        assert new["messages"] == old["messages"]


def test_tools_are_part_of_the_prompt_and_of_the_row(tmp_path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    path = write_rows(tmp_path / "tools.jsonl", [{"query": "Rain?", "tools": json.dumps(tools)}])
    question = load(path)[0][0]
    assert question.sample.tools == tools
    assert result_row(question, "no")["tools"] == tools


def test_writes_happen_window_by_window(engine, questions_file, tmp_path, monkeypatch) -> None:
    writes: list[int] = []
    monkeypatch.setattr(batch, "append_jsonl", lambda _, rows: writes.append(len(rows)))
    questions, rejects = load(questions_file)
    run(engine, tmp_path / "x", questions, rejects, write_batch_size=2, max_batch_size=4)
    assert writes == [2, 2, 1]


def test_an_interrupted_run_is_finished_by_the_next(
    engine, questions_file, tmp_path, monkeypatch, notices
) -> None:
    """What was written stays, and nothing that is drawn depends on where the run stopped."""
    questions, rejects = load(questions_file)
    sampling = GenerationConfig(temperature=1.2, max_new_tokens=5)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "result.jsonl"
    run(engine, whole, questions, rejects, sampling=sampling)
    complete = engine.complete

    def interrupted(*arguments, **options):
        answers = sorted(complete(*arguments, **options))
        yield from (answers[i] for i in (1, 0, 4))  # 2 and 3 are not done yet
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(engine, path, questions, rejects, sampling=sampling)
    assert read_rows(path) == read_rows(whole)[:2]
    monkeypatch.undo()
    monkeypatch.setattr(batch, "say", notices.append)
    stats = run(engine, path, questions, rejects, sampling=sampling, max_batch_size=2)
    assert path.read_bytes() == whole.read_bytes()
    assert (stats.num_samples, stats.num_compared) == (3, 2)
    assert notices == [f"{path} has answers to 2 of 5 rows: they are left out"]
    run(engine, path, questions, rejects, sampling=sampling)
    assert path.read_bytes() == whole.read_bytes()


def test_equal_questions_are_answered_as_often_as_they_are_asked(engine, tmp_path) -> None:
    questions, rejects = load(write_rows(tmp_path / "twice.jsonl", [{"query": "a"}, {"query": "b"}] * 2))
    path = tmp_path / "result.jsonl"
    run(engine, path, questions[:1], rejects)
    run(engine, path, questions, rejects)
    assert [row["messages"][0]["content"] for row in read_rows(path)] == ["a", "b", "a", "b"]


def test_log_probabilities_are_written_as_openai_does(engine, questions_file, tmp_path) -> None:
    questions, rejects = load(questions_file)
    path = tmp_path / "result.jsonl"
    run(engine, path, questions[:2], rejects, logprobs=True, top_logprobs=2)
    for row in read_rows(path):
        content = row["logprobs"]["content"]
        assert len(content) == 5
        for token in content:  # a part of a character has no bytes of its own
            assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
        assert content[0]["logprob"] == pytest.approx(content[0]["top_logprobs"][0]["logprob"])  # greedy
        assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
        assert [len(token["top_logprobs"]) for token in content] == [2] * 5


def test_existing_rows_stay_and_a_torn_line_goes(engine, questions_file, tmp_path, notices) -> None:
    questions, rejects = load(questions_file)
    path = tmp_path / "result.jsonl"
    path.write_text('{"response": "old"}\n{"response": "to')
    mend_last_line(path)
    run(engine, path, questions[:2], rejects)
    rows = read_rows(path)
    assert len(rows) == 3
    assert rows[0] == {"response": "old"}
    assert rows[2]["labels"] == "Indeed."
    assert notices == [f"{path}: the unfinished last line was removed"]


@pytest.mark.parametrize("content", ["", '{"a": 1}\n', '{"a": 1}\n{"b": 2}'])
def test_whole_lines_are_never_removed(tmp_path, notices, content) -> None:
    path = tmp_path / "result.jsonl"
    mend_last_line(path)
    assert not path.exists()
    path.write_text(content)
    mend_last_line(path)
    assert path.read_text() == content + ("\n" if content and not content.endswith("\n") else "")
    assert notices == []


def test_rows_that_cannot_be_used_are_counted_with_their_places(engine, tmp_path, notices) -> None:
    rows = [{"query": "Hi"}, {"foo": 1}, {"query": LONG * 16}, {"foo": 2}, {"text": "an answer alone"}]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    questions, rejects = load(path)
    result = tmp_path / "result.jsonl"
    stats = run(engine, result, questions, rejects)
    assert len(read_rows(result)) == stats.num_samples == 1
    places = sorted(place for places in rejects.places.values() for place in places)
    assert places == [f"{path} line {line}" for line in (2, 3, 4, 5)]
    assert rejects.places["longer than the context of 400 tokens"] == [f"{path} line 3"]
    rejects.report()
    assert len(notices) == len(rejects.places) == 3
    assert any(
        f"{path} line 2, {path} line 4" in line and line.startswith("2 rows not answered") for line in notices
    )


def test_strict_stops_at_the_first_row(engine, tmp_path) -> None:
    path = write_rows(tmp_path / "mixed.jsonl", [{"query": "Hi"}, {"foo": 1}])
    with pytest.raises(ConfigError, match=r"mixed\.jsonl line 2: "):
        load(path, strict=True)
    path = write_rows(tmp_path / "long.jsonl", [{"query": "Hi"}, {"query": LONG * 16}])
    questions, rejects = load(path, strict=True)
    with pytest.raises(ConfigError, match=r"long\.jsonl line 2: longer than the context of 400 tokens"):
        run(engine, tmp_path / "r", questions, rejects)


def test_nothing_usable_is_an_error(tmp_path, notices) -> None:
    with pytest.raises(ConfigError, match=r"no row of .* can be answered"):
        load(write_rows(tmp_path / "bad.jsonl", [{"foo": 1}]))
    assert len(notices) == 1


def test_a_sample_keeps_the_order_and_follows_the_seed(tmp_path) -> None:
    path = write_rows(tmp_path / "many.jsonl", [{"query": str(i)} for i in range(50)])
    asked = [int(q.sample.messages[0]["content"]) for q in load(path, val_dataset_sample=10)[0]]
    again = [int(q.sample.messages[0]["content"]) for q in load(path, val_dataset_sample=10)[0]]
    assert asked == again == sorted(set(asked))
    assert len(asked) == 10
    assert asked != list(range(10))


def test_accuracy_compares_stripped_text_of_labelled_rows(tmp_path, notices) -> None:
    stats = Stats()
    for text, labels, reason in [(" 12\n", "12", "stop"), ("13", "12", "length"), ("x", None, "stop")]:
        stats.add(Completion(text, [1, 2], reason, 10, []), labels)
    report(stats, Rejects(strict=False), metric="acc", result_path=tmp_path / "r.jsonl")
    assert notices[:2] == [
        "1 of 3 answers were cut by --max_new_tokens or the context",
        "acc 0.5000 (1 of 2 answers equal the row's own)",
    ]
    figures = json.loads(notices[2])
    assert list(figures) == [
        "num_prompt_tokens", "num_generated_tokens", "num_samples", "runtime", "samples/s", "tokens/s",
    ]  # fmt: skip
    assert (figures["num_prompt_tokens"], figures["num_generated_tokens"], figures["num_samples"]) == (
        30,
        6,
        3,
    )
