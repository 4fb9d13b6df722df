"""The transformers inference engine: batches, streams, where answers end, how they are sampled."""

import itertools
import json
import logging
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swift.config.generation import GenerationConfig
from swift.config.model import ModelConfig
from swift.config.template import TemplateConfig
from swift.infer import engine as engine_module
from swift.infer.engine import PromptTooLong, TransformersInferEngine
from swift.rollout.detokenize import TextStream, decode_text

GREEDY = GenerationConfig(temperature=0, max_new_tokens=12)
WILD = GenerationConfig(temperature=2.0, max_new_tokens=60)  # a random model: mostly broken UTF-8
QUESTIONS = [
    "Who are you?",
    "What is the capital of France? " * 6,
    "7 + 5?",
    "你是谁？",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "A day",
]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, make_tiny_model_dir) -> Path:
    """Untied, so that a random model does not just repeat its last token."""
    return make_tiny_model_dir(tmp_path_factory.mktemp("infer"), tie_word_embeddings=False)


@pytest.fixture
def load(model_dir):
    def load_engine(**template) -> TransformersInferEngine:
        return TransformersInferEngine.load(
            model_dir,
            model=ModelConfig(device="cpu", torch_dtype="float32"),
            template=TemplateConfig(**template),
        )

    return load_engine


@pytest.fixture
def engine(load) -> TransformersInferEngine:
    return load()


@pytest.mark.parametrize("repetition_penalty", [None, 1.5])
def test_batches_give_the_ids_of_single_prompts_in_the_order_asked(engine, repetition_penalty) -> None:
    sampling = replace(GREEDY, repetition_penalty=repetition_penalty)
    prompts = [user(q) for q in QUESTIONS]
    alone = [engine.generate([p], sampling)[0] for p in prompts]
    assert len({tuple(c.token_ids) for c in alone}) > 3
    for batch_size in (2, 4, 6):
        together = engine.generate(prompts, sampling, batch_size=batch_size)
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert [c.num_prompt_tokens for c in together] == [c.num_prompt_tokens for c in alone]


def test_an_answer_ends_at_a_stop_token_which_is_counted_and_not_shown(engine) -> None:
    free = [engine.generate([user(q)], GREEDY)[0] for q in QUESTIONS[:3]]
    assert {c.finish_reason for c in free} == {"length"}
    assert {c.num_generated_tokens for c in free} == {12}
    stop = free[0].token_ids[4]
    engine.stop_token_ids = [stop]
    ends = [(c.token_ids.index(stop) + 1 if stop in c.token_ids else 12) for c in free]
    stopped = engine.generate([user(q) for q in QUESTIONS[:3]], GREEDY, batch_size=3)
    assert [c.token_ids for c in stopped] == [c.token_ids[:n] for c, n in zip(free, ends, strict=True)]
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].text == decode_text(engine.tokenizer, free[0].token_ids[: ends[0] - 1])
    assert "".join(engine.stream(user(QUESTIONS[0]), GREEDY)) == stopped[0].text


def test_stop_tokens_come_from_template_tokenizer_and_generation_config(tmp_path, model_dir) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in model_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    engine = TransformersInferEngine.load(path, model=ModelConfig(device="cpu"))
    assert set(engine.stop_token_ids) == {2, 7, 9}


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_the_generated_text_even_where_bytes_are_broken(engine, seed) -> None:
    sampling = replace(WILD, seed=seed)
    whole = engine.generate([user("Who are you?")], sampling)[0]
    stream = engine.stream(user("Who are you?"), sampling)
    pieces = []
    with pytest.raises(StopIteration) as end:
        while True:
            pieces.append(next(stream))
    assert end.value.value == whole
    assert "".join(pieces) == whole.text
    assert len(pieces) > 5


def test_a_text_stream_never_shows_half_a_character(tiny_tokenizer) -> None:
    text = "naïve 你好，世界 🙂🏳️‍🌈 end\n  indented"
    stream = TextStream(tiny_tokenizer)
    token_ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [stream.push(token) for token in token_ids]
    assert stream.flush() == ""
    assert "".join(pieces) == text
    assert pieces.count("") > 10  # tokens inside a character
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_what_is_broken_at_the_end_comes_with_the_flush(tiny_tokenizer) -> None:
    token_ids = tiny_tokenizer("ok 🙂", add_special_tokens=False)["input_ids"][:-1]
    stream = TextStream(tiny_tokenizer)
    shown = "".join(stream.push(token) for token in token_ids)
    assert shown == "ok "
    assert shown + stream.flush() == decode_text(tiny_tokenizer, token_ids) == "ok \N{REPLACEMENT CHARACTER}"


def test_a_response_prefix_starts_the_answer_and_is_unescaped(engine, load) -> None:
    prefixed = load(response_prefix="<think>\\n\\n</think>\\n\\n")
    prefix = "<think>\n\n</think>\n\n"
    plain_ids, ids = (e.encode(user("Hi")).token_ids for e in (engine, prefixed))
    assert prefixed.tokenizer.decode(ids) == engine.tokenizer.decode(plain_ids) + prefix
    completion = prefixed.generate([user("Hi")], GREEDY)[0]
    assert completion.text == prefix + decode_text(prefixed.tokenizer, completion.token_ids)
    assert completion.num_generated_tokens == 12
    pieces = list(prefixed.stream(user("Hi"), GREEDY))
    assert pieces[0] == prefix
    assert "".join(pieces) == completion.text


def test_every_row_gets_what_its_own_context_leaves(engine, load) -> None:
    lengths = [len(engine.encode(user(q)).token_ids) for q in QUESTIONS]
    limited = load(max_length=max(lengths) + 3)
    answers = limited.generate([user(q) for q in QUESTIONS], GenerationConfig(temperature=0), batch_size=6)
    assert [c.num_generated_tokens for c in answers] == [max(lengths) + 3 - n for n in lengths]
    assert engine.context == 512


def test_a_prompt_without_room_is_refused_at_once(engine, load) -> None:
    length = len(engine.encode(user("Who are you?")).token_ids)
    assert load(max_length=length + 1).generate([user("Who are you?")], GREEDY)[0].num_generated_tokens == 1
    with pytest.raises(PromptTooLong, match=f"has {length} tokens, the context holds {length}"):
        load(max_length=length).stream(user("Who are you?"), GREEDY)


def test_sampling_follows_its_seed_and_leaves_the_random_state_alone(engine) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        engine.generate([user("Hi")], replace(WILD, seed=seed))[0].token_ids for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (0.6, 0.9, 20)),
        ({"temperature": 0}, (0.0, 0.9, 20)),
        ({"temperature": 0.3}, (0.3, 0.9, 20)),
        ({"top_p": 0.5, "top_k": -1}, (0.6, 0.5, 0)),
    ],
)
def test_flags_override_generation_config(engine, flags, expected) -> None:
    defaults = engine.model.generation_config
    defaults.do_sample, defaults.temperature, defaults.top_p, defaults.top_k = True, 0.6, 0.9, 20
    settled = engine.settle(GenerationConfig(**flags))
    assert (settled.temperature, settled.top_p, settled.top_k) == expected
    assert settled.repetition_penalty == 1


def test_without_sampling_in_the_file_answers_are_greedy_unless_a_flag_draws(engine) -> None:
    engine.model.generation_config.temperature = 0.6
    assert engine.settle(GenerationConfig()).temperature == 0
    assert engine.settle(GenerationConfig(repetition_penalty=1.1)).temperature == 0
    assert engine.settle(GenerationConfig(top_p=0.5)).temperature == 0.6


def test_stop_words_end_answers(engine) -> None:
    free = engine.generate([user("Hi")], GREEDY)[0].text
    stopped, other = (
        engine.generate([user("Hi")], replace(GREEDY, stop_words=(w,)))[0] for w in (free[3:5], "@")
    )
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(free[3:5])], "stop")
    assert other.text == free


def test_closing_a_stream_stops_the_model(engine) -> None:
    stream = engine.stream(user("Hi"), GenerationConfig(temperature=0))
    list(itertools.islice(stream, 2))
    stream.close()
    assert engine.generate([user("Hi")], GREEDY)[0].num_generated_tokens == 12


@pytest.fixture(scope="module")
def padded(model_dir) -> TransformersInferEngine:
    """The same model, as one that our decoder cannot run."""
    return TransformersInferEngine.load(model_dir, model=ModelConfig(device="cpu", attn_impl="sdpa"))


@pytest.mark.parametrize("settings", [{}, {"stop_words": ("e",)}, {"repetition_penalty": 1.5}])
def test_generate_gives_the_answers_of_the_decoder(engine, padded, settings) -> None:
    assert engine.by_decoder and not padded.by_decoder
    sampling, prompts = replace(GREEDY, **settings), [user(q) for q in QUESTIONS]
    expected = engine.generate(prompts, sampling)
    for batch_size in (1, 4):
        answers = padded.generate(prompts, sampling, batch_size=batch_size)
        assert [replace(a, logps=[]) for a in expected] == answers
    assert [type(a.logps[0]) for a in expected] == [float] * len(QUESTIONS)


def test_streams_of_generate(engine, padded, monkeypatch, caplog) -> None:
    """Text, its end, what stops it, and errors in the thread that computes."""
    defaults = padded.model.generation_config
    monkeypatch.setattr(defaults, "do_sample", True)  # no warning about it when greedy
    monkeypatch.setattr(defaults, "top_k", 20)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces = list(padded.stream(user("Hi"), GREEDY))
    logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    assert "".join(pieces) == engine.generate([user("Hi")], GREEDY)[0].text
    assert len(pieces) > 3
    state = torch.get_rng_state()
    stream = padded.stream(user("Hi"), WILD)
    list(itertools.islice(stream, 2))
    stream.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert [t.name for t in threading.enumerate() if t.name == "generate"] == []

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(padded.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(padded.stream(user("Hi"), GREEDY))


def test_a_model_that_needs_padding_is_told_once(model_dir, monkeypatch, capsys) -> None:
    monkeypatch.setattr(engine_module, "refusal_of_flat", lambda *_: "it has layers of type linear_attention")
    TransformersInferEngine.load(model_dir, model=ModelConfig(device="cpu"))
    told = capsys.readouterr().err
    assert (
        "LlamaForCausalLM answers through transformers' generate, because it has layers of type linear"
        in told
    )
