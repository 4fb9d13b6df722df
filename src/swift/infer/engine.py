"""Answers to conversations: prompts as token ids, one sampling setting of flags and files, text as it comes.

Owns: what a prompt is, what flags and generation_config.json make of sampling, where an answer ends.
Not here: how answers are computed (rollout/decoder.py, padded.py), which model (run.py), conversations
(chat.py), files of rows (batch.py).
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import GenerationConfig as HfGenerationConfig
from transformers import PreTrainedTokenizerBase

from swift.config.generation import GenerationConfig
from swift.config.model import ModelConfig
from swift.config.option import ConfigError
from swift.config.quant import QuantConfig
from swift.config.template import TemplateConfig
from swift.engines.attention import FLAT_ATTENTION
from swift.engines.transformers.forward import refusal_of_flat
from swift.infer.openai_answers import Told
from swift.infer.padded import Padded
from swift.models.adapters import load_adapter, merge, tokenizer_directory
from swift.models.load import context_length, load_model, load_tokenizer, pick_device
from swift.rollout import types as rollout
from swift.rollout.decoder import Decoder
from swift.rollout.types import End, Request, Sampling, Token
from swift.template.chat import ChatTemplate
from swift.template.types import Message
from swift.utils.log import say

UNKNOWN_CONTEXT = 4096  # for a model whose config names no limit
PREFIX_TAIL = 8  # prompt tokens kept as context for the first generated ones, see TextStream
ROWS, GPU_ROWS = 64, 256  # answers computed together unless told otherwise


class PromptTooLong(ConfigError):
    """A prompt that leaves no room for an answer in the model's context."""


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]  # ends with the assistant header and the response prefix
    prefix: str  # text of the answer that the prompt already holds


@dataclass(frozen=True, slots=True)
class Completion:
    text: str  # with the response prefix, without the token or the text that ended the answer
    token_ids: list[int]  # what was generated, with the token that ended it
    finish_reason: str  # "stop", or "length" when --max_new_tokens or the context cut the answer
    num_prompt_tokens: int
    logps: list[float]  # of the tokens; empty where the model is run by transformers' generate
    top_logps: list[dict[int, float]] | None = None  # of each token: the most likely ones

    @property
    def told(self) -> list[Told]:
        """Its tokens with their log-probabilities."""
        return list(map(Told, self.token_ids, self.logps, self.top_logps or repeat(None)))

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids)


class Answering(Protocol):
    """What computes answers. Calls are not reentrant."""

    def answers(
        self, requests: Iterable[tuple[int, Request]], *, max_rows: int | None
    ) -> Iterator[tuple[int, list[rollout.Completion]]]:
        """The answers to each request, by its number, as they finish; taken from the iterator with time."""

    def events(self, request: Request) -> Generator[Token | End]:
        """One answer as it comes. Closing the generator stops the model."""


@dataclass(frozen=True, slots=True)
class Continuous:
    """Implements Answering, by our own decoder."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: Sequence[int]
    context: int

    def _decoder(self, max_rows: int) -> Decoder:
        return Decoder(
            self.model, self.tokenizer, stop_token_ids=self.stop_token_ids, context=self.context,
            max_rows=max_rows,
        )  # fmt: skip

    def answers(
        self, requests: Iterable[tuple[int, Request]], *, max_rows: int | None
    ) -> Iterator[tuple[int, list[rollout.Completion]]]:
        usual = GPU_ROWS if self.model.device.type == "cuda" else ROWS
        decoder = self._decoder(max_rows or usual)
        source, tickets, more = iter(requests), {}, True
        while more or tickets:
            while more and len(tickets) < 2 * decoder.max_rows:  # some wait, so that no row ever does
                number, request = next(source, (0, None))
                more = request is not None
                if request is not None:
                    tickets[number] = decoder.submit(request)
            decoder.step()
            for number in [number for number, ticket in tickets.items() if ticket.done]:
                yield number, tickets.pop(number).answers

    def events(self, request: Request) -> Generator[Token | End]:
        decoder, heard = self._decoder(1), list[Token | End]()
        decoder.submit(request, heard.append)
        more = True
        while more:
            more = decoder.step()
            yield from heard
            heard.clear()


class TransformersInferEngine:
    """One loaded model. Calls are not reentrant: one generation at a time."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: TemplateConfig,
        *,
        own_attention: bool = True,
    ) -> None:
        """`own_attention`: False = the kernel that the model was loaded with, by transformers' generate."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, config)
        limits = [limit for limit in (context_length(model), config.max_length) if limit]
        self.context = min(limits, default=UNKNOWN_CONTEXT)
        self.defaults: HfGenerationConfig = model.generation_config
        self.stop_token_ids = find_ends(self.defaults, self.template)
        self.by_decoder = own_attention and takes_flat(model)

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        adapter_path: Path | None = None,
        model: ModelConfig | None = None,
        template: TemplateConfig | None = None,
        quant: QuantConfig | None = None,
        merged: bool = False,
        device: torch.device | None = None,
    ) -> "TransformersInferEngine":
        """From a model directory, with the adapter on top if there is one; the adapter's tokenizer wins.

        `merged`: adapters are folded into the weights in memory.
        """
        model = model or ModelConfig()
        device = device or pick_device(model.device)
        network: Any = load_model(
            model_path, dtype=model.torch_dtype, attention=model.attn_impl, device=device, quant=quant
        )
        if adapter_path:
            network = load_adapter(network, adapter_path, trainable=False)
            network = merge(network) if merged else network
        tokenizer = load_tokenizer(tokenizer_directory(model_path, adapter_path))
        engine = cls(network, tokenizer, template or TemplateConfig(), own_attention=model.attn_impl is None)
        if model.attn_impl is not None:
            say(f"--attn_impl {model.attn_impl}: answers by transformers' generate, slower than without it")
        return engine

    @property
    def answering(self) -> Answering:
        """Made anew for whoever changed the stop tokens."""
        kind = Continuous if self.by_decoder else Padded
        return kind(self.model, self.tokenizer, self.stop_token_ids, self.context)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def encode(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> Prompt:
        """Token ids of a conversation that waits for its answer. Raises PromptTooLong or RenderError."""
        text = self.template.prompt(messages, tools=tools)  # ends with the template's response prefix
        token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(token_ids) >= self.context:
            raise PromptTooLong(
                f"the conversation has {len(token_ids)} tokens, the context holds {self.context}",
                hint="clear the history or ask something shorter",
            )
        return Prompt(token_ids, self.template.response_prefix)

    def request(self, prompt: Prompt, sampling: Sampling, *, number: int = 0, count: int = 1) -> Request:
        """What is asked of the model. Answers of equal seeds differ by `number`."""
        tail = min(PREFIX_TAIL, len(prompt.token_ids)) if prompt.prefix else 0
        return Request(prompt.token_ids, sampling, count, number, continued=tail)

    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        sampling: GenerationConfig,
        *,
        batch_size: int | None = None,
    ) -> list[Completion]:
        """Answers in the order of the prompts."""
        encoded = ((i, self.encode(messages)) for i, messages in enumerate(prompts))
        return [c for _, c in sorted(self.complete(encoded, sampling, batch_size=batch_size))]

    def complete(
        self,
        prompts: Iterable[tuple[int, Prompt]],
        sampling: GenerationConfig,
        *,
        batch_size: int | None,
        top_logps: int = 0,
    ) -> Iterator[tuple[int, Completion]]:
        """(number of the prompt, its answer) as they finish, drawn from (--seed, number).

        Prompts are taken from the iterator as there is room; `batch_size` are answered together.
        """
        settings = self.settle(sampling, top_logps=top_logps)
        asked: dict[int, Prompt] = {}

        def requests() -> Iterator[tuple[int, Request]]:
            for number, prompt in prompts:
                asked[number] = prompt
                yield number, self.request(prompt, settings, number=number)

        for number, [answer] in self.answering.answers(requests(), max_rows=batch_size):
            yield number, self.complete_text(asked.pop(number), answer)

    def complete_text(self, prompt: Prompt, answer: rollout.Completion) -> Completion:
        """The answer with the text that its prompt began."""
        return Completion(
            prompt.prefix + answer.text, answer.token_ids, answer.finish_reason, len(prompt.token_ids),
            answer.logps, answer.top_logps,
        )  # fmt: skip

    def stream(
        self, messages: Sequence[Message], sampling: GenerationConfig, *, tools: list[Any] | None = None
    ) -> Generator[str, None, Completion]:
        """Text of one answer, piece by piece; the generator's return value is the whole.

        The prompt is checked at once, not at the first piece. Closing the generator stops the model.
        """
        return self._stream(self.encode(messages, tools=tools), self.settle(sampling))

    def _stream(self, prompt: Prompt, sampling: Sampling) -> Generator[str, None, Completion]:
        if prompt.prefix:
            yield prompt.prefix
        with closing(self.answering.events(self.request(prompt, sampling))) as events:
            for event in events:
                if event.text:
                    yield event.text
                if isinstance(event, End):
                    return self.complete_text(prompt, event.completion)
        raise AssertionError("an answer without an end")

    def settle(self, flags: GenerationConfig, *, top_logps: int = 0) -> Sampling:
        """What flags and generation_config.json make of sampling.

        A flag that shapes the distribution makes answers be drawn from it; temperature 0 is always greedy.
        """
        file = self.defaults
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(file, name) for name in names if getattr(file, name) is not None}
        chosen = {name: getattr(flags, name) for name in names if name != "min_p"}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if not file.do_sample and not chosen.keys() & {"temperature", "top_p", "top_k"}:
            given["temperature"] = 0.0
        settled = {"temperature": 1.0} | given | chosen
        settled["top_k"] = max(settled.get("top_k", 0), 0)  # -1 is how other engines spell "all tokens"
        return Sampling(
            flags.max_new_tokens or self.context, **settled, stop=flags.stop_words, seed=flags.seed,
            top_logps=top_logps,
        )  # fmt: skip


def find_ends(defaults: HfGenerationConfig, template: ChatTemplate) -> list[int]:
    """Tokens that end an answer: the template's, generation_config.json's, the tokenizer's."""
    ends = defaults.eos_token_id
    file_ends = ends if isinstance(ends, list) else [ends]
    return sorted({*template.stop_token_ids, *file_ends, template.tokenizer.eos_token_id} - {None})


def takes_flat(model: Any) -> bool:
    """Whether our decoder can run the model, which then attends as it needs; said once where it cannot."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    refusal = refusal_of_flat(base, base.config)
    if refusal:
        say(f"{type(base).__name__} answers through transformers' generate, because {refusal}")
        return False
    base.set_attn_implementation(FLAT_ATTENTION)
    return True
