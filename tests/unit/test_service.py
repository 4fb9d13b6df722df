"""The thread behind the server: turns of models, cancelled jobs, limits, a model that fails."""

import asyncio
import itertools
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from swift.engines.transformers.attention import FLAT_ATTENTION
from swift.infer.service import Busy, Closing, Service
from swift.rollout.decoder import Decoder
from swift.rollout.types import End, Request, Sampling

NUM_ROWS = 4


@pytest.fixture(scope="module")
def network(tiny_llama_dir):
    network = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    network.set_attn_implementation(FLAT_ATTENTION)
    return network


@pytest.fixture
def decoders(network, tiny_tokenizer) -> dict[str, Decoder]:
    return {
        name: Decoder(network, tiny_tokenizer, stop_token_ids=[2], context=512, max_rows=NUM_ROWS)
        for name in ("a", "b")
    }


def request(max_tokens: int, count: int = 1) -> Request:
    return Request([5, 6, 7], Sampling(max_tokens=max_tokens), count)


async def read_all(job) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in range(job.count)]
    left = job.count
    while left:
        index, event = await job.next()
        if isinstance(event, End):
            assert answers[index] == event.completion.token_ids
            left -= 1
        else:
            answers[index].append(event.token_id)
    return answers


def serve(decoders, work, **options):
    """Runs `work(service)` and gives what it returns, with the errors that the service told."""
    errors: list[BaseException] = []

    async def main():
        service = Service(
            decoders, **{"limit": 100, "activate": lambda _: None, "fail": errors.append} | options
        )
        try:
            return await work(service)
        finally:
            service.close()

    return asyncio.run(asyncio.wait_for(main(), 60)), errors


def test_models_take_turns(decoders) -> None:
    turns: list[str] = []
    both_are_there = threading.Event()

    def activate(model: str) -> None:
        both_are_there.wait()
        turns.append(model)

    async def work(service):
        jobs = [service.submit("a", [request(20)]), service.submit("b", [request(20)])]
        both_are_there.set()
        return await asyncio.gather(*map(read_all, jobs))

    (first, second), _ = serve(decoders, work, activate=activate)
    assert first == second
    # The first may take its first step alone, and the last one its last.
    assert len(turns) >= 2 * len(first[0]) - 2
    assert all(x != y for x, y in itertools.pairwise(turns))


def test_answers_are_numbered_over_all_prompts_and_counted(decoders) -> None:
    async def work(service):
        answers = await read_all(service.submit("a", [request(5, 2), request(9, 6)]))
        assert (service.num_running, service.num_waiting, service.jobs) == (0, 0, set())
        return answers, dict(service.totals)

    (answers, totals), _ = serve(decoders, work)
    assert answers[:2] == [whole[:5] for whole in answers[2:4]]
    assert totals["generated_tokens"] == sum(map(len, answers))
    assert (totals["requests"], totals["requests_answered"], totals["prompt_tokens"]) == (1, 1, 6)
    assert 0 < totals["first_token_seconds"] < totals["request_seconds"]


def test_more_than_the_limit_is_refused_and_a_cancelled_job_makes_room(decoders) -> None:
    async def work(service):
        endless = service.submit("a", [request(400, 6)])
        with pytest.raises(Busy):
            service.submit("b", [request(1, 2)])
        while service.num_running < NUM_ROWS:
            await endless.next()
        assert (service.num_running, service.num_waiting) == (4, 2)
        service.cancel(endless)
        with pytest.raises(Closing):
            await read_all(endless)
        while service.jobs:
            await asyncio.sleep(0.01)
        await read_all(service.submit("a", [request(1, 7)]))
        assert service.totals["requests_cancelled"] == service.totals["requests_refused"] == 1

    serve(decoders, work, limit=7)
    assert decoders["a"].rows == []


def test_draining_ends_what_takes_too_long(decoders) -> None:
    async def work(service):
        endless = service.submit("a", [request(500)])
        await endless.next()
        service.drain(0.0)
        with pytest.raises(Closing):
            service.submit("a", [request(1)])
        with pytest.raises(Closing):
            while True:
                await endless.next()

    serve(decoders, work)


def test_a_model_that_fails_ends_every_job(decoders, network) -> None:
    calls: list[int] = []

    def break_down(*_) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("none left")

    async def work(service):
        jobs = [service.submit(name, [request(50)]) for name in decoders]
        for job in jobs:
            with pytest.raises(Closing):
                await read_all(job)
        with pytest.raises(Closing):
            service.submit("a", [request(1)])

    hook = network.register_forward_pre_hook(break_down)
    try:
        _, errors = serve(decoders, work)
    finally:
        hook.remove()
    assert [str(error) for error in errors] == ["none left"]
