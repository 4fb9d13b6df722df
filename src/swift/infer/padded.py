"""Answers by transformers' `generate`, for models whose attention cannot be replaced: padded batches.

Not here: models that our own decoder runs (engine.py). Log-probabilities are not told.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from swift.rollout.detokenize import AnswerText
from swift.rollout.sampling import answer_key
from swift.rollout.types import Completion, End, Request, Token

ROWS = 8
NEUTRAL = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # what `generate` takes for "not given" when greedy


@dataclass(frozen=True, slots=True)
class Padded:
    """Implements `swift.infer.engine.Answering`. Draws depend on which requests share a batch."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: Sequence[int]
    context: int

    def answers(
        self, requests: Iterable[tuple[int, Request]], *, max_rows: int | None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As Answering. Requests that follow each other share a batch and have the same settings."""
        source = iter(requests)
        while batch := list(islice(source, max_rows or ROWS)):
            rows = [request for _, request in batch for _ in range(request.count)]
            outputs = iter(self._generate(rows))
            for number, request in batch:
                yield number, [self._finish(request, next(outputs)) for _ in range(request.count)]

    def events(self, request: Request) -> Generator[Token | End]:
        """As Answering; the model runs in a thread of its own."""
        tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                self._generate([request], streamer=_Streamer(tokens.put), cancelled=cancelled)
                tokens.put(None)
            except BaseException as error:  # re-raised where the answer is read
                tokens.put(error)

        worker = threading.Thread(target=work, name="generate", daemon=True)
        worker.start()
        try:
            writer, token_ids, shown = self._writer(request), list[int](), ""
            while (token := tokens.get()) is not None and not writer.stopped:
                if isinstance(token, BaseException):
                    raise token
                token_ids.append(token)
                piece = "" if token in self._ends(request) else writer.push(token)
                shown += piece
                yield Token(0, token, float("nan"), piece, None)
            completion = self._finish(request, token_ids)
            yield End(0, completion.text[len(shown) :], completion)
        finally:
            cancelled.set()
            worker.join()

    def _ends(self, request: Request) -> set[int]:
        return {*self.stop_token_ids, *request.sampling.stop_token_ids}

    def _writer(self, request: Request) -> AnswerText:
        context = request.token_ids[len(request.token_ids) - request.continued :]
        return AnswerText(self.tokenizer, request.sampling.stop, context)

    def _room(self, request: Request) -> int:
        return min(request.sampling.max_tokens, self.context - len(request.token_ids))

    def _finish(self, request: Request, token_ids: list[int]) -> Completion:
        """The row's own part of a batch that ran as long as its longest row."""
        writer, ends, reason, kept = self._writer(request), self._ends(request), "length", list[int]()
        for token in token_ids[: self._room(request)]:
            kept.append(token)
            if token in ends:
                reason = "stop"
                break
            writer.push(token)
            if writer.stopped:
                break
        writer.flush()
        return Completion(kept, [], "stop" if writer.stopped else reason, writer.text)

    def _generate(
        self,
        rows: Sequence[Request],
        *,
        streamer: BaseStreamer | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[list[int]]:
        """What was generated for each row, and whatever followed in its batch. The only call of the model."""
        device = next(self.model.parameters()).device
        prompts = [row.token_ids for row in rows]
        width = max(map(len, prompts))
        # Left padding with the row's own first token: attention never sees it, and a repetition penalty,
        # which looks at ids and not at the mask, finds nothing but what is in the row anyway.
        ids = [[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        room = [self._room(row) for row in rows]
        limits = _Limits(width, torch.tensor(room, device=device), cancelled or threading.Event())
        key = answer_key(rows[0].sampling.seed, rows[0].first) & (1 << 63) - 1
        with (
            torch.inference_mode(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(key)
            output = self.model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self._settings(rows[0], max(room)),
                stopping_criteria=[limits],
                streamer=streamer,
            )
        found: list[list[int]] = output[:, width:].tolist()
        return found

    def _settings(self, request: Request, max_new_tokens: int) -> GenerationConfig:
        sampling = request.sampling
        draws = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        draws |= {"min_p": sampling.min_p} if sampling.min_p else {}
        pad, ends = self.tokenizer.pad_token_id, sorted(self._ends(request))
        # `generate` takes what is left open here from the model's own, and warns of lengths that it finds.
        self.model.generation_config.max_length = self.model.generation_config.max_new_tokens = None
        return GenerationConfig(
            do_sample=sampling.temperature > 0,
            **(draws if sampling.temperature else NEUTRAL),
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            return_dict_in_generate=False,
            eos_token_id=ends or None,
            pad_token_id=pad if pad is not None else next(iter(ends), 0),
        )


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
