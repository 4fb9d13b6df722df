"""The HTTP side of `swift deploy`: routes in OpenAI's form, streams, keys, limits, /health and /metrics.

Owns: one exchange from request to response.
Not here: what a request may say (openai_requests.py), what an answer looks like (openai_answers.py), who
computes (service.py), start and end of the process (server_run.py).
"""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from swift.config.serve import ServeOptions
from swift.infer.openai_answers import THINK, AnswerSplitter, Delta, Told, Writer
from swift.infer.openai_requests import ApiError, ChatRequest, SampledRequest, TextRequest, explain
from swift.infer.server_models import Served
from swift.infer.service import Busy, Closing, Job, Service
from swift.rollout.types import End, Token
from swift.rollout.types import Request as Asked
from swift.template.types import RenderError
from swift.utils.files import append_jsonl
from swift.utils.log import say

TEXT_TOKENS = 16  # longest answer of /v1/completions when nobody says how long, as OpenAI's
PREFIX_TAIL = 8  # prompt tokens whose text the first generated ones continue
DRAINED_BODIES = 8  # times the largest body that are read, to tell a client that it is too large
CLIENT_GONE = 499
Model = TypeVar("Model")
RETRY_SECONDS = 1


@dataclass(eq=False)
class Exchange:
    """One request and its answers on the way out."""

    job: Job
    writer: Writer
    splitters: list[AnswerSplitter]
    conversation: dict[str, Any]  # what was asked, for --result_path


class Serving(Protocol):
    """What an app is built of."""

    models: Mapping[str, Any]
    service: Any  # a Service, or what has its numbers
    options: ServeOptions
    routes: Mapping[str, Callable[..., Awaitable[Any]]]  # by the path of a POST


def find_model(models: Mapping[str, Model], name: str) -> Model:
    """The one that a request names. Raises ApiError."""
    if name not in models:
        raise ApiError(
            404, f"the model {name!r} does not exist, there is {', '.join(models)}",
            param="model", code="model_not_found",
        )  # fmt: skip
    return models[name]


class Server:
    """What the routes share; implements Serving."""

    def __init__(
        self, models: Mapping[str, Served], service: Service, options: ServeOptions, seeds: Callable[[], int]
    ) -> None:
        self.models = models
        self.service = service
        self.options = options
        self.seeds = seeds
        self.routes = {"/v1/chat/completions": self.chat, "/v1/completions": self.text}
        self.encoding = asyncio.Lock()
        self.watchers: set[asyncio.Task[None]] = set()

    async def chat(self, http: Request, body: ChatRequest) -> Response:
        served = find_model(self.models, body.model)
        body.check_stream()
        logprobs = body.count_logprobs(self.options.max_logprobs)
        messages, tools = body.read_messages(), body.read_tools()
        template = served.template(body.chat_template_kwargs.enable_thinking)
        try:
            text = template.prompt(messages, tools=tools)
        except RenderError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        prefix = template.response_prefix
        form = template.calls if tools else None
        async with self.encoding:  # a long text would hold up every stream
            prompt = await asyncio.to_thread(served.encode, text, special=False)
            guide = await asyncio.to_thread(served.guide, body, template, text)
        stops = body.stops + (("Observation:",) if form and form.continues else ())
        sampling = served.sample(
            body, limit=served.room(prompt, body.limit, served.max_tokens), seed=self.seeds(), stops=stops,
            logprobs=logprobs or 0,
        )  # fmt: skip
        asked = Asked(prompt, sampling, count=body.n, continued=PREFIX_TAIL if prefix else 0, guide=guide)
        splitters = [
            AnswerSplitter(
                thinks=text.removesuffix(prefix).rstrip().endswith(THINK), form=form, tools=tools or (),
                single=not body.parallel_tool_calls,
            )
            for _ in range(body.n)
        ]  # fmt: skip
        conversation = {"messages": messages} | ({"tools": tools} if tools else {})
        exchange = self.open(body, served, [asked], splitters, logprobs, conversation)
        return await self.answer(http, body, exchange, prefix)

    async def text(self, http: Request, body: TextRequest) -> Response:
        served = find_model(self.models, body.model)
        body.check_stream()
        logprobs = body.count_logprobs(self.options.max_logprobs)
        requests = []
        for prompt in body.prompts:
            async with self.encoding:
                ids = prompt if isinstance(prompt, list) else await asyncio.to_thread(
                    served.encode, prompt, special=True
                )  # fmt: skip
            wrong = next((token for token in ids if not 0 <= token < len(served.tokenizer)), None)
            if wrong is not None or not ids:
                told = "is empty" if not ids else f"has token {wrong}, the vocabulary {len(served.tokenizer)}"
                raise ApiError(400, f"prompt {told}", param="prompt")
            limit = served.room(ids, body.max_tokens, served.max_tokens or TEXT_TOKENS)
            sampling = served.sample(
                body, limit=limit, seed=self.seeds(), stops=body.stops, logprobs=logprobs or 0
            )
            requests.append(Asked(ids, sampling, count=body.n))
        splitters = [AnswerSplitter(plain=True) for _ in range(body.n * len(requests))]
        exchange = self.open(body, served, requests, splitters, logprobs, {"prompt": body.prompt})
        return await self.answer(http, body, exchange, "")

    def open(
        self,
        body: SampledRequest,
        served: Served,
        requests: Sequence[Asked],
        splitters: list[AnswerSplitter],
        logprobs: int | None,
        conversation: dict[str, Any],
    ) -> Exchange:
        """Asks the service. Raises ApiError when it takes nothing now."""
        count = sum(request.count for request in requests)
        if count > self.service.limit:
            raise ApiError(400, f"{count} answers in one request, this server takes {self.service.limit}")
        try:
            job = self.service.submit(served.name, requests)
        except Busy as error:
            raise ApiError(429, "too many answers are waiting, try again later") from error
        except Closing as error:
            raise ApiError(503, "the server is shutting down") from error
        chat = isinstance(body, ChatRequest)
        writer = Writer(
            id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex, model=served.name,
            created=int(time.time()), chat=chat, tokenizer=served.tokenizer,
            logprobs=logprobs is not None, token_ids=body.return_token_ids,
        )  # fmt: skip
        return Exchange(job, writer, splitters, conversation)

    async def answer(self, http: Request, body: SampledRequest, exchange: Exchange, prefix: str) -> Response:
        """The response; a client that leaves frees what it holds."""
        watcher = asyncio.create_task(self.watch(http, exchange.job))
        self.watchers.add(watcher)  # asyncio itself does not keep tasks alive
        watcher.add_done_callback(self.watchers.discard)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = self.stream(exchange, prefix, with_usage=with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        whole = [Delta() for _ in exchange.splitters]
        try:
            async for index, event in answers_of(exchange.job):
                if isinstance(event, End):
                    done = event.completion
                    whole[index] = exchange.splitters[index].push(prefix + done.text, final=True)
                    whole[index].end(done.finish_reason)
                    tops = done.top_logps or repeat(None)
                    whole[index].tokens = list(map(Told, done.token_ids, done.logps, tops))
        except Closing as error:
            if await http.is_disconnected():
                return Response(status_code=CLIENT_GONE)
            raise ApiError(503, "the server is shutting down") from error
        finally:
            self.service.cancel(exchange.job)
        return JSONResponse(self.finish(exchange, whole))

    async def stream(self, exchange: Exchange, prefix: str, *, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: a chunk for each piece that can be shown."""
        writer, splitters = exchange.writer, exchange.splitters
        whole = [Delta() for _ in splitters]
        parts = [splitter.push(prefix) for splitter in splitters]  # not sent yet
        try:
            for index in range(len(splitters) if writer.chat else 0):
                yield event_of(writer.opening(index))
            async for index, event in answers_of(exchange.job):
                part = parts[index]
                part.add(splitters[index].push(event.text, final=isinstance(event, End)))
                if isinstance(event, Token):
                    part.tokens.append(Told(event.token_id, event.logp, event.top_logps))
                else:
                    part.end(event.completion.finish_reason)
                if part:
                    yield event_of(writer.chunk(index, part))
                    whole[index].add(part)
                    parts[index] = Delta()
            done = self.finish(exchange, whole)
            if with_usage:
                yield event_of(writer.closing(done["usage"]))
            yield "data: [DONE]\n\n"
        except Closing:
            yield event_of(ApiError(503, "the server is shutting down").body)
        finally:
            self.service.cancel(exchange.job)

    def finish(self, exchange: Exchange, whole: Sequence[Delta]) -> dict[str, Any]:
        """The whole response; what is kept and said of it."""
        job, writer = exchange.job, exchange.writer
        asked = sum(len(request.token_ids) for request in job.requests)
        given = sum(len(answer.tokens) for answer in whole)
        usage = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
        response = writer.whole(whole, usage)
        if self.options.result_path:
            common = {"id": writer.id, "model": writer.model, **exchange.conversation, "usage": usage}
            append_jsonl(
                Path(self.options.result_path),
                (common | kept(choice, exchange.conversation) for choice in response["choices"]),
            )
        if self.options.verbose:
            seconds = time.monotonic() - job.began
            say(
                f"{writer.id} {writer.model}: {asked} tokens asked, {given} answered in {seconds:.2f} s, "
                f"{' '.join(str(answer.reason) for answer in whole)}"
            )
        return response

    async def watch(self, http: Request, job: Job) -> None:
        """Cancels the job when its client has left, or has been answered."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.service.cancel(job)


def describe_metrics(service: Any) -> str:
    """Prometheus' text format, version 0.0.4."""
    lines = []
    for name, value in (("running", service.num_running), ("waiting", service.num_waiting)):
        lines += [f"# TYPE swift_answers_{name} gauge", f"swift_answers_{name} {value}"]
    for name in COUNTERS:
        lines += [f"# TYPE swift_{name}_total counter", f"swift_{name}_total {service.totals[name]:g}"]
    return "\n".join(lines) + "\n"


COUNTERS = (
    "requests", "requests_answered", "requests_cancelled", "requests_refused", "prompt_tokens",
    "generated_tokens", "first_tokens", "first_token_seconds", "request_seconds",
)  # fmt: skip


async def answers_of(job: Job) -> AsyncIterator[tuple[int, Token | End]]:
    """Every token and end of a job, until all its answers have ended. Raises Closing."""
    left = job.count
    while left:
        index, event = await job.next()
        left -= isinstance(event, End)
        yield index, event


def event_of(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def kept(choice: dict[str, Any], conversation: dict[str, Any]) -> dict[str, Any]:
    """What --result_path keeps of an answer: in a chat also as the last message, to train on."""
    if "messages" not in conversation:
        return {"response": choice["text"], "finish_reason": choice["finish_reason"]}
    message = choice["message"]
    words = message["content"] or ""
    thoughts = message.get("reasoning_content")
    content = f"<think>\n{thoughts}\n</think>\n\n{words}" if thoughts else words
    own = {"role": "assistant", "content": content}
    if "tool_calls" in message:
        own["tool_calls"] = message["tool_calls"]
    messages = [*conversation["messages"], own]
    return {"response": content, "finish_reason": choice["finish_reason"], "messages": messages}


class Guard:
    """Turns requests away before anything is read into memory: a wrong key, a body that is too large."""

    def __init__(self, app: Any, *, api_key: str | None, max_body_size: int) -> None:
        self.app = app
        self.api_key = api_key
        self.max_body_size = max_body_size

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.api_key and scope["path"].startswith("/v1"):
            headers = dict(scope["headers"])
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not secrets.compare_digest(given, self.api_key.encode()):
                error = ApiError(401, "the API key is wrong or missing", code="invalid_api_key")
                await refusal(error)(scope, receive, send)
                return
        size, body, more = 0, b"", scope["method"] == "POST"
        while more and size <= DRAINED_BODIES * self.max_body_size:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message.get("body", b""))
            body = body + message.get("body", b"") if size <= self.max_body_size else b""
            more = message.get("more_body", False)
        if size > self.max_body_size:
            told = f"the body has more than {self.max_body_size} bytes"
            await refusal(ApiError(413, told, code="request_too_large"))(scope, receive, send)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Any:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)


def refusal(error: ApiError) -> Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def build_app(server: Serving) -> Guard:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    about = {"object": "model", "created": int(time.time()), "owned_by": server.options.owned_by}

    @app.exception_handler(ApiError)
    async def tell(_: Request, error: ApiError) -> Response:
        return refusal(error)

    @app.exception_handler(Exception)  # the log has the traceback
    async def tell_fault(_: Request, error: Exception) -> Response:
        return refusal(ApiError(500, f"the server made a mistake: {type(error).__name__}"))

    @app.exception_handler(RequestValidationError)
    async def tell_invalid(_: Request, error: RequestValidationError) -> Response:
        return refusal(explain(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def tell_http(http: Request, error: HTTPException) -> Response:
        return refusal(ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}"))

    for path, answer in server.routes.items():
        app.post(path)(answer)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, **about} for name in server.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        find_model(server.models, name)
        return {"id": name, **about}

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        return Response(status_code=200 if server.service.is_open else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(describe_metrics(server.service), media_type="text/plain; version=0.0.4")

    return Guard(app, api_key=server.options.api_key, max_body_size=server.options.max_body_size)
