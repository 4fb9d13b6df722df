"""The checks before training: each says its line when it should, and only then."""

import numpy as np
import pytest

from swift.config.data import DataConfig
from swift.config.template import TemplateConfig
from swift.data.audit import audit, find_answers, find_copies
from swift.data.encode import EncodedDataset, Encoder, encode_rows
from swift.data.types import Row
from swift.template.chat import ChatTemplate

LONG = "The capital of France is Paris, and the quick brown fox jumps over the lazy dog 0123456789 times"


def turn(question: str, answer: str) -> dict:
    return {"query": question, "response": answer}


@pytest.fixture
def template(tiny_tokenizer) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer, TemplateConfig())


def encode(template: ChatTemplate, *columns: dict, **options) -> EncodedDataset:
    rows = [Row(content, "a.jsonl", line) for line, content in enumerate(columns, start=1)]
    return encode_rows(rows, Encoder(template, 512, **options), DataConfig())[0]


def test_nothing_to_say(template):
    rows = encode(template, *[turn(f"question {i}", f"{LONG} {i}") for i in range(10)])
    assert audit(rows, template.stop_token_ids) == []


def test_short_answers(template):
    rows = encode(template, *[turn(f"question {i}", "yes") for i in range(9)], turn("what", LONG))
    lines = audit(rows, template.stop_token_ids)
    yes = len(template.tokenizer("yes").input_ids)
    assert lines == [
        f"answers are very short: half of them have at most {yes} token(s) (warned below 12); "
        "the model will learn to answer everything that shortly"
    ]


def test_copies_are_named_and_what_was_repeated_on_purpose_is_not(template):
    columns = [turn(f"question {i}", f"{LONG} {i}") for i in range(4)]
    rows = encode(template, *columns, columns[1])
    assert find_copies(rows) == {4: 1}
    assert audit(rows, template.stop_token_ids) == [
        "1 of 5 rows are exact copies of another row (first: a.jsonl line 5 is a.jsonl line 2)"
    ]
    twice = [Row(columns[0], "a.jsonl", 1)] * 2
    encoded, _ = encode_rows(twice, Encoder(template, 512), DataConfig())
    assert find_copies(encoded) == {}


def test_mixed_thoughts(template):
    thinking = [turn("one", f"<think>hm</think>{LONG}"), turn("two", f"<think>\n\n</think>\n\n{LONG}")]
    lines = audit(encode(template, *thinking, turn("three", LONG)), template.stop_token_ids)
    assert len(lines) == 1 and "(1 with thoughts, 1 with empty thoughts, 1 without)" in lines[0]
    assert audit(encode(template, thinking[0]), template.stop_token_ids) == []


def test_answers_that_do_not_end(template):
    rows = encode(template, turn("one", LONG), turn("two", LONG * 20), truncation_strategy="right")
    found = audit(rows, template.stop_token_ids)
    assert found == []
    data = [Row(turn("one", LONG), "a.jsonl", 1), Row(turn("two", LONG * 20), "a.jsonl", 2)]
    rows, _ = encode_rows(data, Encoder(template, 64, "right"), DataConfig())
    assert len(rows[1].input_ids) == 64
    lines = audit(rows, template.stop_token_ids)
    assert len(lines) == 1 and lines[0].startswith(
        "1 of 2 rows do not end with a trained end-of-turn token (first: a.jsonl line 2)"
    )


def test_answers_are_the_trained_runs(template):
    messages = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "a robot"},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes."},
    ]
    rows = encode(template, {"messages": messages}, turn("Hm?", "No."))
    answers = find_answers(rows, template.stop_token_ids)
    words = [
        template.tokenizer.decode(rows.ids[a:b]) for a, b in zip(answers.starts, answers.ends, strict=True)
    ]
    assert words == ["a robot<|im_end|>", "Yes.<|im_end|>", "No.<|im_end|>"]
    assert answers.rows.tolist() == [0, 0, 1]
    assert answers.is_last.tolist() == [False, True, True]
    assert answers.ended.all()
    assert answers.lengths.tolist() == [
        len(template.tokenizer(text).input_ids) for text in ("a robot", "Yes.", "No.")
    ]


def test_plain_text_has_no_answers_to_judge(tiny_tokenizer):
    plain = ChatTemplate(tiny_tokenizer, TemplateConfig(loss_scale="all"))
    rows = encode(plain, turn("one", "x"), turn("two", "y"))
    assert np.count_nonzero(rows.labels == -100) == 2
    assert audit(rows, plain.stop_token_ids) == []
