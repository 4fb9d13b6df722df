"""Tokens and labels: exact borders, truncation, rows without anything to learn, the coloured preview."""

import copy
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, build_tokenizer, chat, family_template, jinja_template
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from swift import batch
from swift.config.option import ConfigError
from swift.config.template import TemplateConfig
from swift.template import tokenize
from swift.template.chat import ChatTemplate
from swift.template.preview import trained_segments
from swift.template.tokenize import IGNORED, Encoded, Rejected, encode_chats, token_range
from swift.template.words import learn_words

EOT = {"llama3.1": "<|eot_id|>", "r1": "<｜end▁of▁sentence｜>"}


def encode(template: ChatTemplate, messages: list[dict], **options: Any) -> Encoded | Rejected:
    options = {"max_length": None, "truncation_strategy": "delete"} | options
    return encode_chats(template, [messages], **options)[0]


def trained_runs(template: ChatTemplate, encoded: Encoded) -> list[str]:
    return [text for text, weight in trained_segments(template.tokenizer, encoded) if weight]


def test_ids_are_the_tokenizers_and_labels_the_answers() -> None:
    template, messages = family_template("qwen2.5"), chat("Hi", "Yo 😀", "And?", "再见")
    encoded = encode(template, messages)
    text = template.render(messages).text
    assert encoded.input_ids.tolist() == template.tokenizer(text, add_special_tokens=False).input_ids
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32
    assert encoded.loss_scale is None
    trained = encoded.labels != IGNORED
    assert (encoded.labels[trained] == encoded.input_ids[trained]).all()
    assert template.tokenizer.decode(encoded.labels[trained]) == "Yo 😀<|im_end|>再见<|im_end|>"


words = st.text(
    st.characters(codec="utf-8", exclude_characters="<｜"), min_size=1, max_size=12
) | st.sampled_from(["😀👍🏽", "你好，世界", "é\u0301", " x ", "\n\n", "assistant\n", "im_end|>"])


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=3),
    system=st.none() | words,
)
def test_trained_text_is_exactly_the_answers(family: str, turns: list, system: str | None) -> None:
    template = family_template(family)
    messages = chat(*(part for turn in turns for part in turn), system=system)
    answers = [answer for _, answer in turns]
    if family == "llama3.1":
        answers = [answer.strip() for answer in answers]
    if (
        family == "qwen3"
    ):  # the template strips line ends of the last answer and puts an empty thinking before it
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1].lstrip("\n")
    expected = [answer + EOT.get(family, "<|im_end|>") for answer in answers]
    encoded = encode(template, messages)
    runs = trained_runs(template, encoded)
    assert runs == expected
    whole = template.tokenizer.decode(encoded.input_ids)
    assert "".join(text for text, _ in trained_segments(template.tokenizer, encoded)) == whole


@pytest.mark.parametrize("trim_offsets", [None, False, True])
@pytest.mark.parametrize("answer", ["Yes", " Yes", "  two  spaces ", "😀", "  😀  "])
def test_borders_with_a_space_before_the_answer(trim_offsets: bool | None, answer: str) -> None:
    """The header's space may be part of the answer's first token, and tokens of spaces may have no place."""
    source = (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% else %}  {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    tokenizer = build_tokenizer(("</s>",), "</s>", source, trim_offsets=trim_offsets)
    template = ChatTemplate(tokenizer, TemplateConfig())
    encoded = encode(template, chat("Hi", answer, "More ", answer))
    runs = trained_runs(template, encoded)
    # Leading spaces depend on the token that holds them, everything else is there to the letter.
    assert [run.lstrip() for run in runs] == [answer.lstrip() + "</s>"] * 2
    assert all(len(run) <= len(answer) + 5 for run in runs)


def test_token_that_straddles_a_border_belongs_where_it_starts() -> None:
    backend = build_tokenizer(("</s>",), "</s>", None).backend_tokenizer
    text = " assistant"
    encoding = backend.encode(text, add_special_tokens=False)
    assert len(encoding) == 1
    assert token_range(encoding, text, 3, 10) == (1, 1)
    assert token_range(encoding, text, 0, 3) == (0, 1)
    assert token_range(encoding, text, 1, 10) == (0, 1)  # only a space stands before the span


def test_white_space_that_straddles_a_border_is_the_headers() -> None:
    """SmolLM2 has a token of a line end and a space, but a prompt ends with the line end alone."""
    backend = Tokenizer(models.BPE(vocab={"\n": 0, " ": 1, "a": 2, "\n ": 3}, merges=[("\n", " ")]))
    encoding = backend.encode("a\n a", add_special_tokens=False)
    assert encoding.tokens == ["a", "\n ", "a"]
    assert token_range(encoding, "a\n a", 2, 4) == (2, 3)


def test_all_tokens_of_one_character_have_the_same_label() -> None:
    backend = build_tokenizer(("</s>",), "</s>", None).backend_tokenizer
    encoding = backend.encode("a😀b", add_special_tokens=False)
    assert len(encoding) == 6  # the smiley is four bytes
    assert token_range(encoding, "a😀b", 1, 2) == (1, 5)
    assert token_range(encoding, "a😀b", 2, 3) == (5, 6)


def test_row_is_encoded_the_same_alone_and_in_a_batch() -> None:
    rows = [
        chat("Who 😀", "a b"),
        chat("Who are", "c", "d", "e"),
        chat("  x", "f", system="S"),
        chat("\n", "g"),
    ]
    for family in FAMILIES:
        template = family_template(family)
        for batch_rows in (rows, rows[:2], rows[1::2], [rows[0]] * 3):
            together = encode_chats(template, batch_rows, max_length=None, truncation_strategy="delete")
            for encoded, row in zip(together, batch_rows, strict=True):
                alone = encode(template, row)
                assert encoded.input_ids.tolist() == alone.input_ids.tolist()
                assert encoded.labels.tolist() == alone.labels.tolist()


def test_rows_are_encoded_whole_where_the_first_word_of_a_text_is_marked() -> None:
    """SentencePiece puts a space before the first word of a text, so that a text cannot be cut in two."""
    letters = {letter: i for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz12", start=2)}
    backend = Tokenizer(models.BPE(vocab=letters | {"<s>": 0, "</s>": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    source = "{% for m in messages %}{{ m.role }}<s>{{ m.content }}</s>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant<s>{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=source)
    template = ChatTemplate(tokenizer, TemplateConfig())
    chats = [chat("q1", "a"), chat("q2", "b")]
    together = encode_chats(template, chats, max_length=None, truncation_strategy="delete")
    alone = [encode(template, row) for row in chats]
    assert [row.input_ids.tolist() for row in together] == [row.input_ids.tolist() for row in alone]
    assert tokenizer.convert_ids_to_tokens(alone[0].input_ids)[:7] == ["▁", "u", "s", "e", "r", "<s>", "q"]


def test_weights_reach_the_tokens() -> None:
    messages = chat("q", "a1", "q2", "a2")
    messages[1]["loss_scale"] = 2.0
    template = family_template("smollm2")
    encoded = encode(template, messages)
    weights = [weight for text, weight in trained_segments(template.tokenizer, encoded) if weight]
    assert weights == [2.0, 1.0]
    assert encoded.loss_scale.dtype == np.float32
    assert encoded.loss_scale.shape == encoded.labels.shape


def test_first_token_is_never_trained() -> None:
    encoded = encode(family_template("smollm2", loss_scale="all"), chat("q", "a"))
    assert encoded.labels[0] == IGNORED
    assert (encoded.labels[1:] == encoded.input_ids[1:]).all()


def test_bos_of_the_template_is_not_doubled() -> None:
    encoded = encode(family_template("llama3.1"), chat("q", "a"))
    assert encoded.input_ids.tolist().count(0) == 1


def test_truncation() -> None:
    template, messages = family_template("smollm2"), chat("q", "one two three")
    whole = encode(template, messages)
    length = len(whole.input_ids)
    limit = {"max_length": length - 3}
    assert encode(template, messages, max_length=length).input_ids.tolist() == whole.input_ids.tolist()
    assert encode(template, messages, **limit) == Rejected(f"longer than --max_length {length - 3}")
    right = encode(template, messages, **limit, truncation_strategy="right")
    assert right.input_ids.tolist() == whole.input_ids[:-3].tolist()
    assert right.labels.tolist() == whole.labels[:-3].tolist()
    left = encode(template, messages, **limit, truncation_strategy="left")
    assert left.input_ids.tolist() == whole.input_ids[3:].tolist()
    nothing = encode(template, messages, max_length=5, truncation_strategy="right")
    assert nothing == Rejected("no trained token within --max_length 5")


def test_settings_left_in_a_tokenizer_do_not_cut_rows() -> None:
    template = jinja_template(None)
    template.tokenizer.backend_tokenizer.enable_truncation(4)
    template.tokenizer.backend_tokenizer.enable_padding(length=200)
    rows = encode_chats(
        template, [chat("q", "a"), chat("q", "a" * 50)], max_length=None, truncation_strategy="delete"
    )
    texts = [template.tokenizer.decode(row.input_ids) for row in rows]
    assert texts == [template.render(messages).text for messages in (chat("q", "a"), chat("q", "a" * 50))]


def test_rows_with_nothing_to_learn() -> None:
    template = family_template("smollm2")
    silent = chat("q", "a")
    silent[1]["loss"] = False
    rows = encode_chats(
        template, [chat("q"), [], silent, chat("q", "a")], max_length=None, truncation_strategy="delete"
    )
    assert rows[:3] == [
        Rejected("no assistant turn", unsupervised=True),
        Rejected("no assistant turn", unsupervised=True),
        Rejected("no trained token", unsupervised=True),
    ]
    assert isinstance(rows[3], Encoded)


def test_row_that_cannot_be_rendered_is_rejected_with_the_reason() -> None:
    messages = chat("q", "<tool_call>\nnot JSON\n</tool_call>")
    messages[1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    rejected = encode(family_template("smollm2"), messages)
    assert rejected == Rejected("a tool call that does not parse back")


def test_slow_tokenizer_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    template = jinja_template(None)
    monkeypatch.setattr(type(template.tokenizer), "is_fast", False)
    with pytest.raises(ConfigError, match="has no fast version"):
        encode(template, chat("q", "a"))


def test_preview_of_half_a_character_still_joins() -> None:
    template = family_template("smollm2")
    encoded = encode(template, chat("q", "😀😀"))
    cut = Encoded(encoded.input_ids[:-4], encoded.labels[:-4], None)  # inside the second smiley
    pieces = trained_segments(template.tokenizer, cut)
    assert "".join(text for text, _ in pieces) == template.tokenizer.decode(cut.input_ids)
    assert pieces[-1][1] == 1.0


def test_label_that_is_ignored_is_the_same_everywhere() -> None:
    assert tokenize.IGNORED == batch.IGNORED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trim", [None, False])
def test_remembered_words_give_the_same_tokens(family: str, trim: bool | None) -> None:
    """Every way to put blanks, line ends, numbers, signs and special tokens around words, and any border."""
    template = family_template(family)
    backend = copy.deepcopy(template.tokenizer.backend_tokenizer)
    if trim is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    memory = learn_words(backend, tokenize._first_token, tokenize._last_token)
    assert memory is not None
    draw = random.Random(family)
    pieces = ["a", "Paris", "1", "42", ".", "'s", " ", "  ", "\n", " \n", "\t", "é", "你", "😀"]
    pieces += [token.content for token in backend.get_added_tokens_decoder().values()]
    for _ in range(300):
        text = "".join(draw.choices([*pieces, " a", " swift", " The"], k=draw.randint(1, 12)))
        places = sorted(draw.sample(range(len(text) + 1), min(2, len(text))))
        start, end = places[0], places[-1]
        encoding = backend.encode(text, add_special_tokens=False)
        [(ids, [first, last])] = memory.encode([text], [[(start, end)]])
        assert ids.tolist() == encoding.ids, repr(text)
        assert (first, max(first, last)) == token_range(encoding, text, start, end), (text, start, end)


def test_no_words_are_remembered_where_they_depend_on_their_neighbours() -> None:
    def learn(**parts: Any) -> Any:
        backend = copy.deepcopy(family_template("smollm2").tokenizer.backend_tokenizer)
        for name, part in parts.items():
            setattr(backend, name, part)
        return learn_words(backend, tokenize._first_token, tokenize._last_token)

    assert learn() is not None
    assert learn(normalizer=normalizers.NFC()) is not None
    assert learn(normalizer=normalizers.Replace(" ", "_")) is None
    assert learn(pre_tokenizer=pre_tokenizers.Metaspace()) is None
    assert learn(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)) is None
    assert learn(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)) is None
    assert learn(post_processor=processors.ByteLevel(trim_offsets=True)) is None
