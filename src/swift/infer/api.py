"""Answers from Python: `from swift import InferEngine, InferRequest, RequestConfig`.

Not here: how they are computed (engine.py), how flags and checkpoints become an engine (run.py).
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swift.config.generation import GenerationConfig
from swift.config.option import ConfigError, build
from swift.config.runs import InferRun
from swift.infer.engine import Completion
from swift.infer.openai_answers import describe_logprobs
from swift.infer.run import find_source, load_engine
from swift.rollout.types import Request
from swift.template.types import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """A conversation that waits for its answer: messages with `role` and `content`, and tools it may call."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestConfig:
    """How answers are drawn. None: as the engine's own flags or generation_config.json say."""

    max_tokens: int | None = None
    temperature: float | None = None  # 0 = the most likely token
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    stop: Sequence[str] | None = None
    seed: int | None = None
    n: int = 1  # answers to each request
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    index: int
    message: dict[str, str]  # role and content
    finish_reason: str  # "stop" or "length"
    token_ids: list[int]
    logprobs: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Response:
    choices: list[Choice]
    num_prompt_tokens: int
    num_generated_tokens: int

    @property
    def text(self) -> str:
        """The first answer."""
        return self.choices[0].message["content"]


class InferEngine:
    """A model in memory. `flags` are those of `swift infer`: adapters, torch_dtype, device, system, ..."""

    def __init__(self, model: str | None = None, **flags: Any) -> None:
        """Raises ConfigError where the model cannot be found or loaded, or flags contradict each other."""
        adapters = flags.pop("adapters", ())
        named = {"adapters": (adapters,) if isinstance(adapters, str) else tuple(map(str, adapters))}
        run: InferRun = build(InferRun, flags | named | ({"model": str(model)} if model else {}))
        run.check()
        source = find_source(run)
        self.run = source.run
        self.engine = load_engine(source)

    def infer(self, requests: Iterable[InferRequest], config: RequestConfig | None = None) -> list[Response]:
        """The answers to each request, in order. Many requests in one call are answered together.

        Raises ConfigError for a conversation that does not fit into the context.
        """
        config, engine = config or RequestConfig(), self.engine
        if (config.logprobs or config.top_logprobs) and not engine.by_decoder:
            raise ConfigError("logprobs: transformers' generate, which this model needs, does not tell them")
        prompts = [engine.encode(request.messages, tools=request.tools) for request in requests]
        sampling = engine.settle(self._generation(config), top_logps=config.top_logprobs)
        asked: list[tuple[int, Request]] = [
            (i, engine.request(prompt, sampling, number=i * config.n, count=config.n))
            for i, prompt in enumerate(prompts)
        ]
        found = dict(engine.answering.answers(asked, max_rows=self.run.infer.max_batch_size))
        return [
            self._respond([engine.complete_text(prompt, answer) for answer in found[i]], config)
            for i, prompt in enumerate(prompts)
        ]

    def stream(
        self, request: InferRequest, config: RequestConfig | None = None
    ) -> Generator[str, None, Completion]:
        """The text of one answer, piece by piece. Closing the generator stops the model."""
        settings = self._generation(config or RequestConfig())
        return self.engine.stream(request.messages, settings, tools=request.tools)

    def _generation(self, config: RequestConfig) -> GenerationConfig:
        flags = self.run.generation
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        return replace(
            flags,
            **chosen,
            max_new_tokens=config.max_tokens or flags.max_new_tokens,
            stop_words=flags.stop_words if config.stop is None else tuple(config.stop),
        )

    def _respond(self, answers: Sequence[Completion], config: RequestConfig) -> Response:
        wanted = config.logprobs or config.top_logprobs
        choices = [
            Choice(
                index, {"role": "assistant", "content": answer.text}, answer.finish_reason, answer.token_ids,
                describe_logprobs(self.engine.tokenizer, answer.told) if wanted else None,
            )
            for index, answer in enumerate(answers)
        ]  # fmt: skip
        generated = sum(answer.num_generated_tokens for answer in answers)
        return Response(choices, answers[0].num_prompt_tokens, generated)
