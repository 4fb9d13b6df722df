"""The decoder: answers that depend on nothing but their own request, with the log-probabilities they had."""

import itertools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.paged_attention import attend_pages
from transformers import PreTrainedModel

from swift.config.option import ConfigError
from swift.engines.attention import FLAT_ATTENTION
from swift.models.load import load_model, load_tokenizer
from swift.rollout.cache import Cache
from swift.rollout.decoder import Decoder, make_cache
from swift.rollout.prompts import lay_out
from swift.rollout.types import Completion, End, Request, Sampling, Token

CPU = torch.device("cpu")
END = 2


def load(path) -> PreTrainedModel:
    return load_model(path, dtype=None, attention=FLAT_ATTENTION, device=CPU)


@pytest.fixture(params=["slots", "pages"], autouse=True)
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with both kinds of caches."""
    if request.param == "pages":
        kernels = SimpleNamespace(attend_pages=attend_pages)  # the real ones are tested in test_pages.py
        monkeypatch.setitem(sys.modules, "swift.rollout.kernels", kernels)

        def make_paged(*given: Any, paged: bool) -> Cache:
            return make_cache(*given, paged=not paged)

        monkeypatch.setattr("swift.rollout.decoder.make_cache", make_paged)
    return request.param


@pytest.fixture(scope="module")
def model(tiny_llama_dir) -> PreTrainedModel:
    return load(tiny_llama_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return load_tokenizer(tiny_llama_dir)


@pytest.fixture(scope="module")
def decode(model, tokenizer) -> Callable[..., list[list[Completion]]]:
    def run(requests: list[Request], **options: object) -> list[list[Completion]]:
        settings = {"stop_token_ids": [END], "context": 400, "max_rows": 8} | options
        return Decoder(model, tokenizer, **settings).generate(requests)

    return run


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def teacher_forced(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[T, V] log-probabilities of the positions that the answer was drawn at, by transformers' own code."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    model.set_attn_implementation(before)
    return logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ],
)
def test_log_probabilities_are_those_of_teacher_forcing(
    tmp_path, make_tiny_model_dir, tokenizer, family, config
) -> None:
    model = load(make_tiny_model_dir(tmp_path, family, **config))
    decoder = Decoder(model, tokenizer, stop_token_ids=[END], context=512, max_rows=3)
    long = prompt(290)
    requests = [
        Request(prompt(n, seed=n), Sampling(12, seed=n), count=count)
        for n, count in ((3, 2), (17, 1), (9, 3))
    ] + [Request(long, Sampling(12, seed=5)), Request(long, Sampling(12, seed=6))]
    for change in (0.0, 0.1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += change * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        for request, answers in zip(requests, decoder.generate(requests), strict=True):
            assert len(answers) == request.count
            for answer in answers:
                logps = teacher_forced(model, request.token_ids, answer.token_ids)
                expected = logps.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(answer.logps), expected, atol=1e-5, rtol=0)


def test_greedy_answers_are_those_of_generate(model, tokenizer, decode) -> None:
    prompts = [prompt(n, seed=n) for n in (4, 31, 8, 2, 150)]
    found = decode([Request(p, Sampling(20, temperature=0)) for p in prompts], max_rows=2)
    model.set_attn_implementation("sdpa")
    for ids, [answer] in zip(prompts, found, strict=True):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=END)
        assert answer.token_ids == expected[0, len(ids) :].tolist()
    model.set_attn_implementation(FLAT_ATTENTION)


def test_an_answer_does_not_depend_on_what_else_is_in_flight(decode) -> None:
    settings = [
        Sampling(25, temperature=0.7, seed=1),
        Sampling(9, top_k=5, seed=2),
        Sampling(30, top_p=0.6, seed=3),
        Sampling(14, min_p=0.2, repetition_penalty=1.3, seed=4),
        Sampling(11, temperature=0),
        Sampling(40, temperature=1.8, top_k=40, top_p=0.9, seed=6),
    ]
    requests = [Request(prompt(5 + 7 * i, seed=i), s, count=2) for i, s in enumerate(settings)]
    together = decode(requests, max_rows=12)
    narrow = decode(requests[::-1], max_rows=3, prefill_tokens=20)[::-1]
    for request, answers, others in zip(requests, together, narrow, strict=True):
        assert [a.token_ids for a in answers] == [a.token_ids for a in others]
        for number, answer in enumerate(answers):  # a group is its answers asked for one by one
            [[alone]] = decode([Request(request.token_ids, request.sampling, first=number)])
            assert alone.token_ids == answer.token_ids
            torch.testing.assert_close(alone.logps, answer.logps, atol=1e-5, rtol=0)
    assert together[0][0].token_ids != together[0][1].token_ids


def test_rows_of_one_settings_share_a_prompt_that_is_read_once(model, tokenizer, monkeypatch) -> None:
    decoder = Decoder(model, tokenizer, stop_token_ids=[], context=400, max_rows=8, prefill_tokens=100)
    sizes, run = [], decoder._run
    monkeypatch.setattr(decoder, "_run", lambda ids, *a, **k: sizes.append(len(ids)) or run(ids, *a, **k))
    requests = [Request(prompt(60), Sampling(3), count=3), Request(prompt(60, 1), Sampling(3), count=5)]
    answers = decoder.generate(requests)
    assert [len(a) for a in answers] == [3, 5]
    # 60 tokens, a step of 3 rows; the second prompt waits for the budget of the next step; 8 rows, then 5.
    assert sizes == [60, 3, 60, 8, 5]


@pytest.mark.parametrize(
    ("family", "config"), [("llama", {}), ("qwen2", {"use_sliding_window": True, "sliding_window": 5})]
)
def test_what_prompts_begin_with_is_read_once(
    tmp_path, make_tiny_model_dir, tokenizer, monkeypatch, family, config
) -> None:
    model = load(make_tiny_model_dir(tmp_path, family, max_window_layers=1, **config))
    decoder = Decoder(model, tokenizer, stop_token_ids=[], context=400, max_rows=8)
    decoder.generate([Request(prompt(3), Sampling(1))])  # it learns what a row takes
    sizes, run = [], decoder._run
    monkeypatch.setattr(decoder, "_run", lambda ids, *a, **k: sizes.append(len(ids)) or run(ids, *a, **k))
    system = prompt(40, seed=7)
    requests = [
        Request(system + prompt(n, seed=n), Sampling(4, seed=n), count=count)
        for n, count in ((5, 2), (1, 1), (12, 1))
    ] + [Request(system[:], Sampling(4))]
    answers = decoder.generate(requests)
    assert sizes[0] == 39 + (6 + 2 + 13 + 1)  # the shortest prompt needs a last token of its own
    for request, group in zip(requests, answers, strict=True):
        for answer in group:
            logps = teacher_forced(model, request.token_ids, answer.token_ids)
            expected = logps.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(answer.logps), expected, atol=1e-5, rtol=0)


def test_short_beginnings_are_read_with_each_prompt() -> None:
    layout = lay_out([[1, 2, *range(10, 60)], [1, 2, *range(60, 90)]])
    assert layout.shared == 0
    assert layout.lengths == [52, 32]
    assert lay_out([[5, 6]]).ids == [5, 6]


def test_memory_that_does_not_suffice_makes_rows_wait(model, tokenizer, decode, monkeypatch, cache) -> None:
    """2 layers, keys and values of 2 heads of 16 float32: 512 bytes a token.

    5 slots of 128 or 2 of 256, or 9 pages of 64 to share.
    """
    settings = Sampling(115, temperature=1.3, seed=5, repetition_penalty=1.2, stop=("zzz",))
    requests = [
        Request(prompt(20 + i, seed=i), settings, count=count) for i, count in enumerate((2, 1, 3, 1))
    ]
    expected = decode(requests, stop_token_ids=[])
    decoder = Decoder(
        model, tokenizer, stop_token_ids=[], context=400, max_rows=8, memory_bytes=512 * 128 * 5
    )
    sizes, run = [], decoder._run
    monkeypatch.setattr(decoder, "_run", lambda ids, *a, **k: sizes.append(len(ids)) or run(ids, *a, **k))
    found = decoder.generate(requests)
    assert [[a.token_ids for a in answers] for answers in found] == [
        [a.token_ids for a in answers] for answers in expected
    ]
    assert [[a.text for a in answers] for answers in found] == [[a.text for a in b] for b in expected]
    if cache == "pages":
        assert sizes.count(3) > 10 and max(s for s in sizes if s < 10) > 3  # more rows while they are short
        assert any(s > 64 for s in sizes) and decoder.cache.count == 10
        return
    # The third group waits for three slots at once; with 128 tokens one row has to give way, and is read
    # again with what it had answered.
    assert sizes[:5] == [20, 2, 21, 3, 3]
    assert sizes[sizes.index(2, 3) - 1] == 3
    assert any(128 < size < 160 for size in sizes)
    assert decoder.cache.rows * decoder.cache.capacity <= 128 * 5


def test_what_memory_does_not_hold_ends_alone(model, tokenizer, cache) -> None:
    """As the context does: others go on being answered."""
    if cache == "slots":
        pytest.skip("a slot is as long as the context")
    decoder = Decoder(model, tokenizer, stop_token_ids=[], context=400, max_rows=8, memory_bytes=512 * 64 * 4)
    long, short = decoder.generate([Request(prompt(20), Sampling(300)), Request(prompt(5), Sampling(9))])
    assert (len(long[0].token_ids), long[0].finish_reason) == (
        193 - 20,
        "length",
    )  # one is not stored
    assert (len(short[0].token_ids), short[0].finish_reason) == (9, "length")
    with pytest.raises(ConfigError, match="the prompt has 200 tokens, memory holds 192"):
        decoder.submit(Request(prompt(200), Sampling(9)))
    assert len(decoder.generate([Request(prompt(150), Sampling(9))])[0][0].token_ids) == 9


def test_settings_shape_the_distribution(model, tokenizer, decode) -> None:
    ids = prompt(12)
    scaled = teacher_forced(model, ids, [0])[0]
    [[by_k]] = decode([Request(ids, Sampling(1, top_k=3, seed=8, top_logps=5))])
    kept = scaled.topk(3)
    expected = (kept.values - kept.values.logsumexp(0)).tolist()
    assert by_k.top_logps is not None
    assert by_k.top_logps[0] == pytest.approx(
        dict(zip(kept.indices.tolist(), expected, strict=True)), abs=1e-5
    )
    assert by_k.logps[0] == pytest.approx(by_k.top_logps[0][by_k.token_ids[0]])

    sharp = (scaled / 0.25).log_softmax(-1)
    ranked = sharp.exp().sort(descending=True)
    size = int((ranked.values.cumsum(0) < 0.5).sum()) + 1
    drawn = decode([Request(ids, Sampling(1, temperature=0.25, top_p=0.5, seed=1), count=8)])[0]
    nucleus = dict(zip(ranked.indices[:size].tolist(), ranked.values[:size].tolist(), strict=True))
    for answer in drawn:
        expected = nucleus[answer.token_ids[0]] / sum(nucleus.values())
        assert answer.logps[0] == pytest.approx(float(torch.tensor(expected).log()), abs=1e-5)

    likely = {i for i, p in enumerate(sharp.exp().tolist()) if p >= 0.3 * float(sharp.exp().max())}
    drawn = decode([Request(ids, Sampling(1, temperature=0.25, min_p=0.3, seed=2), count=8)])[0]
    assert {a.token_ids[0] for a in drawn} <= likely

    [[greedy]] = decode(
        [Request(ids, Sampling(30, temperature=0, repetition_penalty=1e6))], stop_token_ids=[]
    )
    assert len(set(greedy.token_ids)) == 30  # nothing comes twice,
    assert not set(greedy.token_ids) & set(ids)  # also not from the prompt


def test_stop_texts_are_found_across_tokens_and_left_out(tokenizer, decode) -> None:
    request = Request(prompt(6), Sampling(30, temperature=1.5, seed=3))
    [[free]] = decode([request], stop_token_ids=[])
    assert (free.finish_reason, len(free.token_ids)) == ("length", 30)
    pieces = [tokenizer.decode([token]) for token in free.token_ids]
    borders = [a[-1:] + b[:1] for a, b in itertools.pairwise(pieces)]
    stop = next(t for t in borders[5:] if t.isascii() and len(t) == 2 and t not in pieces)
    before = free.text[: free.text.index(stop)]
    [[stopped]] = decode(
        [Request(request.token_ids, Sampling(30, temperature=1.5, seed=3, stop=("never", stop)))],
        stop_token_ids=[],
    )
    assert (stopped.text, stopped.finish_reason) == (before, "stop")
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stop in tokenizer.decode(stopped.token_ids)
    assert stop not in tokenizer.decode(stopped.token_ids[:-1])
    assert len(stopped.token_ids) > 5
    by_id = Sampling(30, temperature=1.5, seed=3, stop_token_ids=(free.token_ids[4],))
    [[ended]] = decode([Request(request.token_ids, by_id)], stop_token_ids=[])
    first = free.token_ids.index(free.token_ids[4])
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.text == tokenizer.decode(free.token_ids[:first])


def test_listeners_hear_everything_once(model, tokenizer) -> None:
    decoder = Decoder(model, tokenizer, stop_token_ids=[END], context=400, max_rows=4)
    heard: list[Token | End] = []
    sampling = Sampling(20, temperature=1.5, seed=9, stop=("zzz",), top_logps=2)
    ticket = decoder.submit(Request(prompt(5), sampling, count=2), heard.append)
    while decoder.step():
        assert not ticket.done
    for index, completion in enumerate(ticket.completions):
        mine = [event for event in heard if event.index == index]
        tokens = [event for event in mine if isinstance(event, Token)]
        assert [t.token_id for t in tokens] == completion.token_ids
        assert [t.logp for t in tokens] == completion.logps
        assert [t.top_logps for t in tokens] == completion.top_logps
        assert isinstance(mine[-1], End)
        assert mine[-1].completion is completion
        assert "".join(event.text for event in mine) == completion.text


def test_what_is_cancelled_leaves_the_others_alone(model, tokenizer, decode) -> None:
    requests = [Request(prompt(6 + i, seed=i), Sampling(20, seed=i)) for i in range(5)]
    whole = decode(requests, stop_token_ids=[])
    decoder = Decoder(model, tokenizer, stop_token_ids=[], context=400, max_rows=3)
    tickets = [decoder.submit(request) for request in requests]
    for _ in range(4):
        decoder.step()
    decoder.cancel(tickets[0])  # in flight
    decoder.cancel(tickets[4])  # waits
    while decoder.step():
        pass
    decoder.cancel(tickets[1])  # is done
    reasons = [ticket.completions[0].finish_reason for ticket in tickets]
    assert reasons == ["abort", "length", "length", "length", "abort"]
    assert tickets[0].completions[0].token_ids == whole[0][0].token_ids[:5]  # a prefill gives one as well
    assert tickets[4].completions[0].token_ids == []
    for i in (1, 2, 3):
        assert tickets[i].completions[0].token_ids == whole[i][0].token_ids


def test_the_context_ends_answers(model, tokenizer, decode) -> None:
    [[answer]] = decode([Request(prompt(25), Sampling(100, seed=1))], stop_token_ids=[], context=32)
    assert (len(answer.token_ids), answer.finish_reason) == (7, "length")
    with pytest.raises(ConfigError, match="the prompt has 32 tokens, the context holds 32"):
        decode([Request(prompt(32), Sampling(1))], context=32)


def test_penalties_count_the_tokens_of_the_answer(model, decode) -> None:
    """As the API's reference has it."""
    shapes = [(0.0, 0.0), (0.7, 0.0), (0.0, 1.5), (-0.3, 0.4)]
    requests = [
        Request(prompt(9, seed=4), Sampling(25, temperature=0.0, frequency_penalty=f, presence_penalty=p))
        for f, p in shapes
    ]
    found = [answer.token_ids for [answer] in decode(requests, stop_token_ids=[], max_rows=3)]
    for request, (frequency, presence), ids in zip(requests, shapes, found, strict=True):
        for step, logps in enumerate(teacher_forced(model, request.token_ids, ids)):
            counts = torch.bincount(torch.tensor(ids[:step], dtype=torch.int64), minlength=len(logps))
            expected = logps - frequency * counts - presence * (counts > 0)
            assert expected[ids[step]] > expected.max() - 1e-4
    assert len({tuple(ids) for ids in found}) > 2
