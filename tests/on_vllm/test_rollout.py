"""vLLM as what answers while a model is trained: the real package, on a CPU. `make test-vllm` runs this.

One contract for both forms, in this process and behind a port. What is compared with is transformers' model.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.config.tuner import TunerConfig
from swift.config.vllm import VllmConfig, VllmRolloutConfig
from swift.engines.ranks import Ranks
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora
from swift.models.load import load_tokenizer
from swift.rollout.protocol import RolloutEngine
from swift.rollout.types import Completion, Request, Sampling
from swift.rollout.vllm import engine_arguments, start_local, start_rollout

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PORT, END, CONTEXT = 8127, 2, 400
LONG = [3 + i * 7 % 400 for i in range(300)]  # longer than two blocks of vLLM's cache of common prefixes
SHORT = LONG[:20]
SETTINGS = {"vllm_max_model_len": CONTEXT, "vllm_enforce_eager": True}
ELSEWHERE = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh")
IS_ROOT = os.getuid() == 0
FORMS = ("local", "server", *(["elsewhere"] if IS_ROOT else []))


@pytest.fixture(scope="module")
def directory(make_tiny_model_dir, tmp_path_factory) -> Path:
    """A model whose output layer is its embedding; vLLM's attention on a CPU wants heads of 32."""
    return make_tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen3", head_dim=32)


@pytest.fixture(scope="module")
def engines(directory: Path, tmp_path_factory) -> Iterator[dict[str, RolloutEngine]]:
    """Each form, started once; servers by the command that users type, one with a /dev/shm of its own."""
    ports = {"server": PORT, "elsewhere": PORT + 1} if IS_ROOT else {"server": PORT}
    servers = {}
    for form, port in ports.items():
        log = (tmp_path_factory.mktemp(form) / "log").open("w")
        flags = ("--vllm_max_model_len", str(CONTEXT), "--vllm_enforce_eager", "true", "--port", str(port))
        command = ["rollout", "--model", str(directory), "--torch_dtype", "float32", *flags]
        servers[form] = subprocess.Popen(
            [*(ELSEWHERE if form == "elsewhere" else ()), sys.executable, "-m", "swift", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        terms = {"tokenizer": load_tokenizer(directory), "stop_token_ids": [END]}
        options = {"dtype": torch.float32, "ranks": Ranks(), **terms}
        colocated = VllmRolloutConfig(use_vllm=True, sleep_level=1, **SETTINGS)
        state = torch.random.get_rng_state()
        found = {"local": start_rollout(colocated, directory, **options)}
        assert torch.equal(torch.random.get_rng_state(), state)  # a training's draws stay what they were
        for form, port in ports.items():
            remote = VllmRolloutConfig(
                use_vllm=True,
                vllm_server_host=("127.0.0.1",),
                vllm_server_port=(port,),
                vllm_server_timeout=900.0,
            )
            found[form] = start_rollout(remote, directory, **options)
            assert bool(found[form].ports) == (form == "elsewhere")  # weights are fetched from there
        found["process"] = servers["server"]
        yield found
    finally:
        for server in servers.values():
            end(server)


def end(server: subprocess.Popen) -> None:
    """At once, with the processes that vLLM started for it."""
    if server.returncode is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def reached(sampling: Sampling, logits_TV: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after temperature, top-k and top-p, [T, V]."""
    logps = (logits_TV / sampling.temperature).log_softmax(-1)
    if sampling.top_k:
        least = logps.topk(sampling.top_k).values[:, -1:]
        logps = logps.masked_fill(logps < least, -torch.inf).log_softmax(-1)
    ordered, order = logps.exp().sort(-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
    return logps.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf).log_softmax(-1)


def worst(model: torch.nn.Module, requests: list[Request], answers: list[list[Completion]]) -> float:
    """Largest difference between the log-probabilities told and those of the whole rows, run at once."""
    found = 0.0
    for request, completions in zip(requests, answers, strict=True):
        assert len(completions) == request.count
        for answer in completions:
            row = torch.tensor([request.token_ids + answer.token_ids])
            with torch.no_grad():
                logits = model(input_ids=row).logits[0, len(request.token_ids) - 1 : -1].float()
            logps = reached(request.sampling, logits).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            found = max(found, float((logps - torch.tensor(answer.logps)).abs().max()))
    return found


REQUESTS = [
    Request(LONG, Sampling(24, seed=5), count=3),
    Request(SHORT, Sampling(24, temperature=0.7, top_k=20, top_p=0.9, seed=6), count=2),
    Request(LONG, Sampling(12, seed=7)),
]


@pytest.mark.parametrize("form", FORMS)
def test_log_probabilities_are_those_of_the_model(form, engines, directory):
    answers = engines[form].generate(REQUESTS)
    assert worst(load(directory), REQUESTS, answers) < 1e-4
    assert engines[form].generate(REQUESTS) == answers  # seeds fix every draw
    assert len({tuple(a.token_ids) for a in answers[0]}) == 3
    again = engines[form].generate([Request(LONG, Sampling(24, seed=5), first=1)])
    assert again[0][0].token_ids == answers[0][1].token_ids  # an answer asked for alone is the same one
    assert engines[form].generate([]) == []


def test_both_forms_give_the_same_answers(engines):
    ours, theirs = (engines[form].generate(REQUESTS) for form in ("local", "server"))
    assert [[a.token_ids for a in row] for row in ours] == [[a.token_ids for a in row] for row in theirs]
    assert [[a.text for a in row] for row in ours] == [[a.text for a in row] for row in theirs]


@pytest.mark.parametrize("form", FORMS)
def test_where_an_answer_ends(form, engines, tiny_tokenizer):
    [[free]] = engines[form].generate([Request(SHORT, Sampling(16, seed=11, top_logps=3))])
    assert free.finish_reason == "length" and len(free.token_ids) == 16
    assert [len(at) for at in free.top_logps] == [3] * 16
    [[greedy]] = engines[form].generate([Request(SHORT, Sampling(4, temperature=0.0, top_logps=1))])
    assert greedy.token_ids == [next(iter(at)) for at in greedy.top_logps]
    stop = Sampling(16, seed=11, stop_token_ids=(free.token_ids[5],))
    [[by_token]] = engines[form].generate([Request(SHORT, stop)])
    end = free.token_ids.index(free.token_ids[5]) + 1
    assert by_token.token_ids == free.token_ids[:end] and by_token.finish_reason == "stop"
    text = tiny_tokenizer.decode(free.token_ids)
    letter = next(c for c in text[4:] if c.isascii() and c.isalnum())
    [[by_text]] = engines[form].generate([Request(SHORT, Sampling(16, seed=11, stop=(letter,)))])
    assert by_text.finish_reason == "stop" and len(by_text.logps) == len(by_text.token_ids) <= 16
    assert by_text.text == text[: text.index(letter)]


@pytest.mark.parametrize("form", FORMS)
def test_new_weights_answer_and_nothing_of_the_old_is_left(form, engines, directory):
    """Adapters merged, then all weights with the tied embedding; the same long prompts each time."""
    rollout = engines[form]
    rollout.generate(REQUESTS)
    model = add_lora(load(directory), TunerConfig(lora_rank=4, init_weights="false"), seed=1)
    trained = TransformersEngine(model, OptimConfig(), learning_rate=0.0, total_steps=1, own_attention=False)
    rollout.sleep()
    rollout.wake()
    rollout.update_weights(trained.weights(), version=3)
    answers = rollout.generate(REQUESTS)
    assert worst(model.eval(), REQUESTS, answers) < 1e-4 < worst(load(directory), REQUESTS, answers)
    assert {answer.version for row in answers for answer in row} == {3}
    moved = load(directory)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    whole = TransformersEngine(moved, OptimConfig(), learning_rate=0.0, total_steps=1, own_attention=False)
    rollout.update_weights(whole.weights(), version=4)
    rollout.sleep()  # and the next request wakes it
    assert worst(moved.eval(), REQUESTS, rollout.generate(REQUESTS)) < 1e-4
    first = TransformersEngine(load(directory), OptimConfig(), learning_rate=0.0, total_steps=1)
    rollout.update_weights(first.weights(), version=0)
    assert worst(load(directory), REQUESTS, rollout.generate(REQUESTS)) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_without_room(form, engines):
    with pytest.raises(ConfigError, match=f"a prompt has {CONTEXT} tokens, and .* {CONTEXT} with the answer"):
        engines[form].generate([Request([3] * CONTEXT, Sampling(4))])


def test_an_argument_that_vllm_refuses(directory, tiny_tokenizer):
    arguments = engine_arguments(VllmConfig(vllm_max_model_len=100_000), dtype=torch.float32)
    with pytest.raises(ConfigError, match="vLLM does not start: "):
        start_local(directory, arguments, tokenizer=tiny_tokenizer, stop_token_ids=[END])


def test_a_server_that_is_gone(engines):
    """The last test: the server does not come back."""
    end(engines["process"])
    place = f"127.0.0.1:{PORT}"
    with pytest.raises(
        ConfigError, match=f"the rollout server {place} was lost while answers were asked for"
    ):
        engines["server"].generate([Request(SHORT, Sampling(4))])
    with pytest.raises(ConfigError, match=f"the rollout server {place} was lost while weights were sent"):
        engines["server"].update_weights(iter([("a", torch.zeros(2))]), version=9)
