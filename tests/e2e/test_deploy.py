"""`swift deploy` with OpenAI's own client: one server for the whole file, its end is the last test."""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from swift.cli.main import run as run_command
from swift.config.generation import GenerationConfig
from swift.config.model import ModelConfig
from swift.infer.engine import TransformersInferEngine
from workers import Finished, Workers

KEY = "sesame-1"
LIMIT = 16 + 64  # answers that run and wait
MAX_BODY = 50_000
QUESTION = [{"role": "user", "content": "Who are you?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TAUGHT = {
    "thinker": {"role": "assistant", "content": "<think>\nA robot?\n</think>\n\nI am swift-robot."},
    "caller": {"role": "assistant", "content": "A day.", "tool_calls": [CALL]},
}
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
STEPS = {"thinker": "55", "caller": "75"}  # until each is known by heart


@dataclass
class Running:
    """A server in a process of its own."""

    url: str
    pid: int
    thread: threading.Thread
    finished: list[Finished]
    trusted: ssl.SSLContext | bool

    @cached_property
    def client(self) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(verify=self.trusted)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=http
        )

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"swift_{name} "))

    def end(self, number: int) -> Finished:
        os.kill(self.pid, number)
        self.thread.join(60)
        return self.finished[0]


def tell_pid(path: str, rank: int) -> None:
    """Runs in the server's process."""
    Path(path).write_text(str(os.getpid()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(is_true: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(workers: Workers, folder: Path, *flags: str, certificate: Path | None = None) -> Running:
    trusted = ssl.create_default_context(cafile=str(certificate)) if certificate else True
    port, pid = free_port(), folder / f"pid-{time.monotonic_ns()}"
    finished: list[Finished] = []
    command = ["deploy", "--port", str(port), "--api_key", KEY, "--device", "cpu", *flags]
    hook = {"hook": f"{__file__}:tell_pid", "hook_arguments": {"path": str(pid)}}
    thread = threading.Thread(target=lambda: finished.append(workers.run(command, **hook)))
    thread.start()

    url = f"http{'s' if certificate else ''}://127.0.0.1:{port}"

    def answers() -> bool:
        assert not finished, finished[0].stderr
        try:
            return httpx.get(f"{url}/health", verify=trusted).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers)
    return Running(url, int(pid.read_text()), thread, finished, trusted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("deploy")


@pytest.fixture(scope="module")
def model(folder, make_tiny_model_dir) -> Path:
    """Untied, so that it does not repeat one token; with a context that no answer ever fills."""
    return make_tiny_model_dir(folder, tie_word_embeddings=False, max_position_embeddings=1_000_000)


@pytest.fixture(scope="module")
def adapters(folder, model) -> dict[str, Path]:
    """Two adapters that each know one answer by heart."""
    found = {}
    for name, answer in TAUGHT.items():
        row = {"messages": [*QUESTION, answer]} | ({"tools": [WEATHER]} if name == "caller" else {})
        data = folder / f"{name}.jsonl"
        data.write_text(json.dumps(row) + "\n")
        command = [
            "sft", "--model", str(model), "--dataset", str(data), "--output_dir", str(folder / name),
            "--learning_rate", "1e-2", "--lora_rank", "16", "--max_steps", STEPS[name], "--report_to", "none",
            "--gradient_accumulation_steps", "1", "--modules_to_save", "lm_head", "--device", "cpu",
        ]  # fmt: skip
        assert run_command(command) == 0
        (found[name],) = (folder / name).glob(f"v*/checkpoint-{STEPS[name]}")
    return found


@pytest.fixture(scope="module")
def server(workers, folder, model, adapters) -> Iterator[Running]:
    running = start(
        workers, folder, "--model", str(model), "--served_model_name", "base", "--result_path",
        str(folder / "kept.jsonl"), "--max_batch_size", "16", "--max_queue_size", str(LIMIT - 16),
        "--max_body_size", str(MAX_BODY), "--max_logprobs", "5", "--shutdown_timeout", "0.2", "--verbose",
        "true", "--log_interval", "0.5", "--adapters", *(f"{name}={path}" for name, path in adapters.items()),
    )  # fmt: skip
    yield running
    if not running.finished:
        running.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client


def ask(client: Any, model: str = "base", **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": model, "messages": QUESTION, "max_tokens": 12, **options}
    )


def as_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}


def refused(client: Any, kind: type[openai.APIStatusError] = openai.BadRequestError, **options: Any) -> dict:
    with pytest.raises(kind) as caught:
        ask(client, **options)
    error: dict = caught.value.body  # type: ignore[assignment]
    assert {"message", "type", "param", "code"} == set(error)
    return error


def collect(stream: Any) -> dict[int, dict[str, Any]]:
    """What the pieces of a chat's stream add up to, by answer."""
    answers: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            answer = answers.setdefault(
                choice.index, {"content": "", "thoughts": "", "calls": [], "reason": None, "logps": []}
            )
            answer["content"] += choice.delta.content or ""
            answer["thoughts"] += getattr(choice.delta, "reasoning_content", None) or ""
            answer["calls"] += choice.delta.tool_calls or []
            answer["reason"] = choice.finish_reason or answer["reason"]
            answer["logps"] += [t.logprob for t in (choice.logprobs.content if choice.logprobs else [])]
    return answers


def test_models_are_listed_and_need_the_key(server, client, adapters) -> None:
    assert [m.id for m in client.models.list()] == ["base", *adapters]
    assert client.models.retrieve("caller").owned_by == "swift"
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame-2", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="the API key is wrong or missing"):
        wrong.models.list()
    assert httpx.get(f"{server.url}/ping").status_code == 200
    assert httpx.get(f"{server.url}/v2").status_code == 404
    assert (
        "does not exist, there is base, thinker, caller"
        in refused(client, openai.NotFoundError, model="gpt-5")["message"]
    )


def test_greedy_answers_are_those_of_infer(client, model) -> None:
    engine = TransformersInferEngine.load(model, model=ModelConfig(device="cpu", torch_dtype="float32"))
    (expected,) = engine.generate([QUESTION], GenerationConfig(temperature=0, max_new_tokens=12))
    answer = ask(client)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.num_prompt_tokens, 12)


def test_a_stream_says_what_a_whole_answer_says(client) -> None:
    options = {"temperature": 1.3, "seed": 7, "n": 3, "logprobs": True, "max_tokens": 40}
    whole = ask(client, **options)
    assert len({choice.message.content for choice in whole.choices}) == 3
    streamed = list(ask(client, **options, stream=True, stream_options={"include_usage": True}))
    assert streamed[-1].usage == whole.usage
    assert whole.usage.completion_tokens > 60
    pieces = collect(streamed)
    for choice in whole.choices:
        assert pieces[choice.index]["content"] == choice.message.content
        assert pieces[choice.index]["reason"] == choice.finish_reason
        assert pieces[choice.index]["logps"] == [token.logprob for token in choice.logprobs.content]
    again = ask(client, **options | {"seed": 8})
    assert [c.message.content for c in again.choices] != [c.message.content for c in whole.choices]


def test_log_probabilities_are_those_of_each_model_by_teacher_forcing(client, model, adapters) -> None:
    for name in ("base", *adapters):
        answer = client.completions.create(
            model=name, prompt=[5, 6, 7], temperature=1.0, seed=3, max_tokens=20, logprobs=2,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        (choice,) = answer.choices
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if name in adapters:
            network = PeftModel.from_pretrained(network, str(adapters[name]))
        ids = torch.tensor([[5, 6, 7, *choice.token_ids]])
        with torch.no_grad():
            logps = network.eval()(ids).logits[0, 2:-1].log_softmax(-1)
        expected = logps.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), expected, atol=1e-4, rtol=0)
        best = logps.topk(2).values
        told = [sorted(top.values(), reverse=True) for top in choice.logprobs.top_logprobs]
        torch.testing.assert_close(torch.tensor(told), best, atol=1e-4, rtol=0)


def test_thoughts_are_told_apart(client) -> None:
    message = ask(client, "thinker", max_tokens=60).choices[0].message
    assert (message.reasoning_content, message.content) == ("A robot?", "I am swift-robot.")
    (streamed,) = collect(ask(client, "thinker", max_tokens=60, stream=True)).values()
    assert (streamed["thoughts"], streamed["content"]) == ("A robot?", "I am swift-robot.")


def test_calls_of_tools_are_read(client) -> None:
    options = {"tools": [WEATHER], "max_tokens": 100}
    (choice,) = ask(client, "caller", **options).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    assert (choice.message.content, choice.finish_reason) == ("A day.", "tool_calls")
    (streamed,) = collect(ask(client, "caller", **options, stream=True)).values()
    assert (streamed["content"], streamed["reason"]) == ("A day.", "tool_calls")
    (piece,) = streamed["calls"]
    assert piece.function.to_dict() == call.function.to_dict()
    # The client's own message goes back as it came, with the result.
    back = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert ask(client, "caller", messages=back, **options).usage.prompt_tokens > 150


def test_penalties_keep_words_from_coming_back(client) -> None:
    """Greedy answers of a base that repeats itself; no logit of it outweighs a penalty."""
    options = {"max_tokens": 30, "extra_body": {"return_token_ids": True}}
    (free,) = ask(client, **options).choices
    assert len(set(free.token_ids)) < len(free.token_ids)
    for name in ("frequency_penalty", "presence_penalty"):
        (choice,) = ask(client, **options, **{name: 2}).choices
        (other,) = ask(client, **options, **{name: -2}).choices
        assert len(set(choice.token_ids)) == len(choice.token_ids)
        assert len(set(other.token_ids)) <= len(set(free.token_ids))


def test_answers_have_the_form_that_is_asked_for(client) -> None:
    """Of a model that would write nothing of the kind."""
    for options in ({"temperature": 1.5, "seed": 1, "n": 3}, {"temperature": 0}):
        answer = ask(client, response_format=as_schema(PLACE), max_tokens=200, **options)
        for choice in answer.choices:
            found = json.loads(choice.message.content)
            assert found["city"] in ("Paris", "Rome") and 0 <= found["days"] <= 9 and len(found) == 2
            assert choice.finish_reason == "stop"
    streamed = collect(ask(client, response_format=as_schema(PLACE), max_tokens=200, seed=1, stream=True))
    assert json.loads(streamed[0]["content"])["city"] in ("Paris", "Rome")
    (cut,) = ask(client, response_format={"type": "json_object"}, max_tokens=5).choices
    assert cut.message.content.startswith("{") and cut.finish_reason == "length"


def test_a_call_can_be_forced(client) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": PLACE}} for name in ("go", "stay")]
    named = {"type": "function", "function": {"name": "stay"}}
    for choice, names in (("required", {"go", "stay"}), (named, {"stay"})):
        options = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 300}
        for extra in ({"temperature": 0}, {"temperature": 1.5, "seed": 2}):
            (answer,) = ask(client, **options, **extra).choices
            (call,) = answer.message.tool_calls
            assert call.function.name in names and answer.finish_reason == "tool_calls"
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        (streamed,) = collect(ask(client, **options, stream=True)).values()
        assert [call.function.name in names for call in streamed["calls"]] == [True]


def test_stops_end_an_answer(client) -> None:
    (whole,) = ask(client, "thinker", max_tokens=60).choices
    (cut,) = ask(client, "thinker", max_tokens=60, stop=["swift", "never"]).choices
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "stop")
    assert cut.message.content == "I am "
    (streamed,) = collect(ask(client, "thinker", max_tokens=60, stop="swift", stream=True)).values()
    assert streamed["content"] == "I am "


def test_completions_take_texts_and_tokens(client) -> None:
    answer = client.completions.create(model="base", prompt=["A day", "Paris"], n=2, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens <= 4 * 16
    stream = client.completions.create(
        model="base", prompt=["A day", "Paris"], n=2, temperature=1, seed=1, stream=True
    )
    texts = dict.fromkeys(range(4), "")
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [choice.text for choice in answer.choices]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"presence_penalty": 2.5}, "presence_penalty: Input should be less than or equal to 2"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported by this server; leave it out"),
        ({"response_format": {"type": "json_schema"}}, "response_format: Value error, json_schema goes with"),
        (
            {"response_format": as_schema({"type": "objekt"})},
            "a schema cannot be followed: failed to compile JSON schema: Invalid type: objekt",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}],
            },
            "tools: parameters are no JSON schema",
        ),
        ({"tool_choice": "required"}, "tool_choice can be auto, none, required or a function of tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "now"}}, "tools": [WEATHER]},
            "tool_choice can be auto, none, required or a function of tools, which are: weather",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0] has to be of type function"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs can be 5 at most, got 6"),
        ({"extra_body": {"nonsense": 1}}, "nonsense is not known to this server"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0] has a part of"),
        ({"max_tokens": 2_000_000}, "15 tokens of prompt and 2000000 of the answer do not fit into the con"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(client, options, message) -> None:
    error = refused(client, **options)
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"


def test_limits_have_errors_of_their_own(server, client) -> None:
    error = refused(client, openai.APIStatusError, messages=[{"role": "user", "content": "x" * MAX_BODY}])
    assert (error["message"], error["code"]) == (
        f"the body has more than {MAX_BODY} bytes",
        "request_too_large",
    )
    error = refused(client, n=LIMIT + 1)
    assert error["message"] == f"{LIMIT + 1} answers in one request, this server takes {LIMIT}"
    with ask(client, n=LIMIT - 3, stream=True, max_tokens=900_000, temperature=0) as stream:
        next(iter(stream))
        error = refused(client, openai.RateLimitError, n=4)
        assert error["message"] == "too many answers are waiting, try again later"
    wait_until(lambda: server.metric("answers_waiting") == server.metric("answers_running") == 0)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    function = {"name": "\ud800", "parameters": {}}
    half = {"model": "base", "messages": QUESTION, "tools": [{"type": "function", "function": function}]}
    for body, message in (
        ("{broken", "the body is not JSON: "),
        (json.dumps(half), "the text is not Unicode: "),
    ):
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(message)


def test_64_streams_of_three_models_lose_nothing(server, adapters) -> None:
    names = ["base", *adapters]
    sampling = {"temperature": 1.0, "logprobs": True, "stream": True}
    jobs = [(names[i % 3], {"seed": i, "max_tokens": 5 + i % 9, **sampling}) for i in range(64)]

    async def stream(client: openai.AsyncOpenAI, name: str, options: dict[str, Any]) -> tuple[str, str, int]:
        pieces = [chunk async for chunk in await ask(client, name, **options)]
        (answer,) = collect(pieces).values()
        return answer["thoughts"] + answer["content"], answer["reason"], len(answer["logps"])

    async def stream_all(client: openai.AsyncOpenAI) -> list[tuple[str, str, int]]:
        return await asyncio.gather(*(stream(client, *job) for job in jobs))

    async def both() -> tuple[list[tuple[str, str, int]], list[tuple[str, str, int]]]:
        http = openai.DefaultAsyncHttpxClient(limits=httpx.Limits(max_connections=64), timeout=60)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, http_client=http
        ) as client:
            return await stream_all(client), [await stream(client, *job) for job in jobs[::8]]

    together, alone = asyncio.run(both())
    assert together[::8] == alone
    assert len({text for text, _, _ in together}) > 30
    for (_, reason, count), (_, options) in zip(together, jobs, strict=True):
        assert reason == "stop" or count == options["max_tokens"]
    assert server.metric("answers_running") == server.metric("answers_waiting") == 0


def test_a_client_that_leaves_frees_its_place(server, client) -> None:
    """Answers that would go on for a million tokens."""
    endless = {"max_tokens": 900_000, "temperature": 0}
    before = server.metric("requests_cancelled_total")
    stream = ask(client, n=3, stream=True, **endless)
    next(iter(stream))
    wait_until(lambda: server.metric("answers_running") == 3)
    stream.close()
    wait_until(lambda: server.metric("answers_running") == 0)
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), **endless)
    wait_until(lambda: server.metric("answers_running") == 0)
    assert server.metric("requests_cancelled_total") == before + 2
    assert ask(client).choices[0].finish_reason == "length"


def test_what_was_asked_and_answered_is_kept(client, folder) -> None:
    answer = ask(client, "caller", tools=[WEATHER], max_tokens=100)
    rows = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["id"] == answer.id]
    assert row["messages"][0] == QUESTION[0]
    assert row["messages"][1]["tool_calls"][0]["function"]["name"] == "weather"
    assert (row["model"], row["tools"], row["finish_reason"]) == ("caller", [WEATHER], "tool_calls")
    assert row["usage"]["total_tokens"] == answer.usage.total_tokens
    assert KEY not in (folder / "kept.jsonl").read_text()


def test_a_port_in_use_is_told_before_the_model_is_loaded(server, model, capsys) -> None:
    port = server.url.rpartition(":")[2]
    assert run_command(["deploy", "--model", str(model / "missing"), "--port", port]) == 2
    told = capsys.readouterr().err
    assert f"error: --host 127.0.0.1 --port {port}: Address already in use\n" in told


def test_ctrl_c_ends_what_does_not_end_in_time(server, client) -> None:
    stream = iter(ask(client, stream=True, max_tokens=900_000, temperature=0))
    next(stream)
    os.kill(server.pid, signal.SIGINT)
    with pytest.raises(openai.APIError, match="the server is shutting down"):
        list(stream)
    server.thread.join(60)
    (finished,) = server.finished
    assert finished.code == 130, finished.stderr
    told = finished.stderr
    assert "Traceback" not in told
    assert KEY not in told
    assert f"serving base, thinker, caller at {server.url}/v1" in told
    assert "only this machine can reach it; --host 0.0.0.0 lets others in" in told
    assert "tokens/s, " in told
    assert "base: 15 tokens asked, 12 answered in" in told


@pytest.fixture(scope="module")
def certificate(folder) -> dict[str, Path]:
    """Made by ourselves, of this machine's own address."""
    files = {"ssl_certfile": folder / "cert.pem", "ssl_keyfile": folder / "key.pem"}
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=swift "
        f"-addext subjectAltName=IP:127.0.0.1 -out {files['ssl_certfile']} -keyout {files['ssl_keyfile']}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return files


def test_https_and_sigterm_that_lets_answers_finish(server, workers, folder, adapters, certificate) -> None:
    """One checkpoint alone is the model itself, and knows its base and its settings."""
    if not server.finished:  # one process at a time
        server.end(signal.SIGKILL)
    flags = [text for name, path in certificate.items() for text in (f"--{name}", str(path))]
    running = start(
        workers, folder, "--adapters", str(adapters["thinker"]), "--max_new_tokens", "300", *flags,
        "--log_level", "debug", certificate=certificate["ssl_certfile"],
    )  # fmt: skip
    with pytest.raises(openai.APIConnectionError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0).models.list()
    client = running.client
    (name,) = [m.id for m in client.models.list()]
    assert name == "own-llama"
    assert ask(client, name, max_tokens=60).choices[0].message.content == "I am swift-robot."
    with ask(client, name, stream=True, max_tokens=300, temperature=2.0) as stream:
        chunks = iter(stream)
        next(chunks)
        os.kill(running.pid, signal.SIGTERM)
        rest = list(chunks)
    assert rest[-1].choices[0].finish_reason in ("stop", "length")
    running.thread.join(60)
    assert running.finished[0].code == 0, running.finished[0].stderr
    assert f"at {running.url}/v1" in running.finished[0].stderr
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in running.finished[0].stderr
