"""Answers from a model through transformers' `generate`: batches, and one answer as a stream of text.

Owns: prompts as token ids, one sampling setting from flags and generation_config.json, where an answer ends.
Not here: which model (run.py), conversations (chat.py), files of rows (batch.py).
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig as HfGenerationConfig
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from swift.config.generation import GenerationConfig
from swift.config.model import ModelConfig
from swift.config.option import ConfigError
from swift.config.template import TemplateConfig
from swift.models.adapters import load_adapter
from swift.models.load import context_length, load_model, load_tokenizer, pick_device
from swift.rollout.detokenize import TextStream, decode_text
from swift.template.chat import ChatTemplate
from swift.template.types import Message

UNKNOWN_CONTEXT = 4096  # for a model whose config names no limit
PREFIX_TAIL = 8  # prompt tokens kept as context for the first generated ones, see TextStream


class PromptTooLong(ConfigError):
    """A prompt that leaves no room for an answer in the model's context."""


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]  # ends with the assistant header and the response prefix
    prefix: str  # text of the answer that the prompt already holds


@dataclass(frozen=True, slots=True)
class Completion:
    text: str  # with the response prefix, without the token that ended the answer
    token_ids: list[int]  # what was generated, with the token that ended it
    finish_reason: str  # "stop", or "length" when --max_new_tokens or the context cut the answer
    num_prompt_tokens: int

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids)


class TransformersInferEngine:
    """One loaded model. Calls are not reentrant: one generation at a time."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, config)
        limits = [limit for limit in (context_length(model), config.max_length) if limit]
        self.context = min(limits, default=UNKNOWN_CONTEXT)
        defaults: HfGenerationConfig = model.generation_config
        # Lengths come from the flags and the context only; a max_length in the file would also make
        # `generate` warn at every call.
        defaults.max_length = defaults.max_new_tokens = None
        ends = defaults.eos_token_id
        file_ends = ends if isinstance(ends, list) else [ends]
        known = {*self.template.stop_token_ids, *file_ends, tokenizer.eos_token_id} - {None}
        self.stop_token_ids = sorted(known)

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        adapter_path: Path | None = None,
        model: ModelConfig | None = None,
        template: TemplateConfig | None = None,
    ) -> "TransformersInferEngine":
        """From a model directory, with the adapter on top if there is one; the adapter's tokenizer wins."""
        model = model or ModelConfig()
        device = pick_device(model.device)
        network: Any = load_model(
            model_path, dtype=model.torch_dtype, attention=model.attn_impl, device=device
        )
        tokenizer_path = model_path
        if adapter_path:
            network = load_adapter(network, adapter_path, trainable=False)
            if (adapter_path / "tokenizer_config.json").is_file():
                tokenizer_path = adapter_path
        return cls(network, load_tokenizer(tokenizer_path), template or TemplateConfig())

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

    def generate(
        self, prompts: Sequence[Sequence[Message]], sampling: GenerationConfig, *, batch_size: int = 8
    ) -> list[Completion]:
        """Answers in the order of the prompts."""
        encoded = [self.encode(messages) for messages in prompts]
        return [
            c for _, c in sorted(self.complete(encoded, sampling, batch_size=batch_size), key=lambda x: x[0])
        ]

    def complete(
        self, prompts: Sequence[Prompt], sampling: GenerationConfig, *, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """(index of the prompt, its answer) as batches finish.

        Prompts of similar length share a batch, to compute little padding; the longest go first, so that a
        batch too big for the memory shows at once.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))
        for number, start in enumerate(range(0, len(order), batch_size)):
            rows = order[start : start + batch_size]
            batch = [prompts[i] for i in rows]
            outputs = self._generate(batch, replace(sampling, seed=sampling.seed + number))
            yield from ((i, self._complete(p, ids)) for i, p, ids in zip(rows, batch, outputs, strict=True))

    def stream(
        self, messages: Sequence[Message], sampling: GenerationConfig, *, tools: list[Any] | None = None
    ) -> Generator[str, None, Completion]:
        """Text of one answer, piece by piece; the generator's return value is the whole.

        The prompt is checked at once, not at the first piece. Closing the generator stops the model.
        """
        return self._stream(self.encode(messages, tools=tools), sampling)

    def _stream(self, prompt: Prompt, sampling: GenerationConfig) -> Generator[str, None, Completion]:
        tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                self._generate([prompt], sampling, streamer=_Streamer(tokens.put), cancelled=cancelled)
                tokens.put(None)
            except BaseException as error:  # re-raised where the text is read
                tokens.put(error)

        worker = threading.Thread(target=work, name="generate", daemon=True)
        worker.start()
        try:
            if prompt.prefix:
                yield prompt.prefix
            text = TextStream(self.tokenizer, self._tail(prompt))
            token_ids: list[int] = []
            while (token := tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                token_ids.append(token)
                if token not in self.stop_token_ids and (piece := text.push(token)):
                    yield piece
            if piece := text.flush():
                yield piece
            return self._complete(prompt, token_ids)
        finally:
            cancelled.set()
            worker.join()

    def _room(self, prompt: Prompt, sampling: GenerationConfig) -> int:
        left = self.context - len(prompt.token_ids)
        return min(left, sampling.max_new_tokens or left)

    def _tail(self, prompt: Prompt) -> list[int]:
        return prompt.token_ids[-PREFIX_TAIL:] if prompt.prefix else []

    def _complete(self, prompt: Prompt, token_ids: list[int]) -> Completion:
        stopped = bool(token_ids) and token_ids[-1] in self.stop_token_ids
        shown = token_ids[:-1] if stopped else token_ids
        text = prompt.prefix + decode_text(self.tokenizer, shown, self._tail(prompt))
        return Completion(text, token_ids, "stop" if stopped else "length", len(prompt.token_ids))

    def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: GenerationConfig,
        *,
        streamer: BaseStreamer | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[list[int]]:
        """Generated ids of each row, up to and with its stop token. The only call of the model."""
        width = max(len(p.token_ids) for p in prompts)
        # Left padding with the row's own first token: attention never sees it, and a repetition penalty,
        # which looks at ids and not at the mask, finds nothing but what is in the row anyway.
        rows = [[p.token_ids[0]] * (width - len(p.token_ids)) + p.token_ids for p in prompts]
        mask = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts]
        room = [self._room(p, sampling) for p in prompts]
        limits = _Limits(width, torch.tensor(room, device=self.device), cancelled or threading.Event())
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed)
            output = self.model.generate(
                input_ids=torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                generation_config=self._settings(sampling, max(room)),
                stopping_criteria=[limits],
                streamer=streamer,
            )
        return [self._cut(ids, limit) for ids, limit in zip(output[:, width:].tolist(), room, strict=True)]

    def _settings(self, sampling: GenerationConfig, max_new_tokens: int) -> HfGenerationConfig:
        """What the flags say; `generate` takes everything left open from generation_config.json."""
        chosen: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
        shape = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if sampling.temperature == 0:
            chosen["do_sample"] = False
        elif any(value is not None for value in shape.values()):
            # -1 is how other engines spell "all tokens", 0 is transformers' way.
            chosen |= shape | {"do_sample": True, "top_k": 0 if sampling.top_k == -1 else sampling.top_k}
        pad = self.tokenizer.pad_token_id
        return HfGenerationConfig(
            **{name: value for name, value in chosen.items() if value is not None},
            max_new_tokens=max_new_tokens,
            num_beams=1,
            return_dict_in_generate=False,
            eos_token_id=self.stop_token_ids or None,
            pad_token_id=pad if pad is not None else next(iter(self.stop_token_ids), 0),
        )

    def _cut(self, token_ids: list[int], limit: int) -> list[int]:
        """The row's own part of a batch that ran as long as its longest row."""
        kept = token_ids[:limit]
        end = next((i for i, token in enumerate(kept) if token in self.stop_token_ids), len(kept))
        return kept[: end + 1]


class _Limits(StoppingCriteria):
    """Ends each row at its own length, and all of them when the caller has lost interest."""

    def __init__(self, prompt_length: int, limits_B: torch.Tensor, cancelled: threading.Event) -> None:
        self.prompt_length = prompt_length
        self.limits_B = limits_B
        self.cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        generated = input_ids.shape[1] - self.prompt_length
        return (self.limits_B <= generated) | self.cancelled.is_set()


class _Streamer(BaseStreamer):
    """Hands each generated token of a batch of one to `accept`; the first `put` is the prompt."""

    def __init__(self, accept: Callable[[int], None]) -> None:
        self.accept = accept
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.accept(int(value))
        self.is_prompt = False

    def end(self) -> None:
        pass
