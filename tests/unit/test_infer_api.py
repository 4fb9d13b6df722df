"""Answers from Python."""

import pytest

from swift import InferEngine, InferRequest, RequestConfig
from swift.config.option import ConfigError


@pytest.fixture(scope="module")
def engine(tmp_path_factory, make_tiny_model_dir) -> InferEngine:
    path = make_tiny_model_dir(tmp_path_factory.mktemp("api"), tie_word_embeddings=False)
    return InferEngine(str(path), device="cpu", max_length=200, max_new_tokens=7)


def ask(text: str) -> InferRequest:
    return InferRequest(messages=[{"role": "user", "content": text}])


def test_requests_are_answered_in_order_as_the_flags_or_the_config_say(engine) -> None:
    requests = [ask(text) for text in ("Who are you?", "7 + 5?", "A day " * 9)]
    responses = engine.infer(requests)
    assert [engine.infer([request])[0].text for request in requests] == [r.text for r in responses]
    assert {(r.num_generated_tokens, r.choices[0].finish_reason) for r in responses} == {(7, "length")}
    assert responses[0].choices[0].message == {"role": "assistant", "content": responses[0].text}
    assert responses[2].num_prompt_tokens > responses[1].num_prompt_tokens > 0
    short = engine.infer(requests[:1], RequestConfig(max_tokens=3, stop=["\x00"]))[0]
    assert short.choices[0].token_ids == responses[0].choices[0].token_ids[:3]
    assert "".join(engine.stream(requests[0], RequestConfig(max_tokens=3))) == short.text


def test_answers_of_a_group_differ_and_follow_the_seed(engine) -> None:
    config = RequestConfig(n=4, temperature=1.5, seed=3, top_logprobs=2)
    one, two = (
        [[c.token_ids for c in r.choices] for r in engine.infer([ask("Hi"), ask("Hi")], config)]
        for _ in range(2)
    )
    assert one == two
    assert len({tuple(ids) for group in one for ids in group}) == 8
    response = engine.infer([ask("Hi")], config)[0]
    assert response.num_generated_tokens == 28
    assert len(response.choices[3].logprobs["content"][0]["top_logprobs"]) == 2


def test_mistakes_are_told(engine, tmp_path) -> None:
    with pytest.raises(ConfigError, match="the context holds 200"):
        engine.infer([ask("A day " * 300)])
    with pytest.raises(ConfigError, match="--model or --adapters is missing"):
        InferEngine()
    with pytest.raises(ConfigError, match="nowhere"):
        InferEngine(str(tmp_path / "nowhere"))
