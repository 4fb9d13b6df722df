"""Requests and answers in vLLM's terms, the same in its own process and over HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from swift.rollout.detokenize import AnswerText, decode_text
from swift.rollout.types import Completion, Request

FINISHED = ("stop", "length")  # any other reason is an answer that was given up
MASK = 2**64 - 1


def first_seed(request: Request) -> int:
    """Of answer `request.first`; vLLM gives each further one the next number.

    Seeds of requests are neighbours, too, so they are spread first (a round of SplitMix64,
    doi:10.1145/2660193.2660195): answer 1 of seed 7 must not draw as answer 0 of seed 8.
    """
    mixed = (request.sampling.seed + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return ((mixed ^ (mixed >> 31)) >> 2) + request.first


@dataclass(frozen=True, slots=True)
class Terms:
    """The translation for one model. `stop_token_ids` end every answer; config.json's own do not."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]

    def ends(self, request: Request) -> set[int]:
        """Tokens that end an answer to the request."""
        return {*request.sampling.stop_token_ids, *self.stop_token_ids}

    def sampling(self, request: Request) -> dict[str, Any]:
        """vLLM's SamplingParams."""
        asked = request.sampling
        return {
            "n": request.count,
            "seed": first_seed(request),
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "min_p": asked.min_p,
            "repetition_penalty": asked.repetition_penalty,
            "stop": list(asked.stop),
            "stop_token_ids": sorted(self.ends(request)),
            "ignore_eos": True,
            "logprobs": asked.top_logps,
        }

    def text(self, request: Request, token_ids: list[int]) -> str:
        """Of an answer, without what ended it; as our own decoder has it.

        vLLM's text may begin with a part of the prompt, where that ends within a character (0.32).
        """
        shown = token_ids[:-1] if token_ids and token_ids[-1] in self.ends(request) else token_ids
        if not request.sampling.stop:
            return decode_text(self.tokenizer, shown, tail(request))
        writer = self.writer(request)
        for token in shown:
            writer.push(token)
        writer.flush()
        return writer.text

    def writer(self, request: Request) -> AnswerText:
        """What makes text of an answer's tokens as they come."""
        return AnswerText(self.tokenizer, request.sampling.stop, tail(request))

    def read_answer(self, request: Request, answer: Any, version: int) -> Completion:
        """A whole CompletionOutput of vLLM's."""
        chosen = [at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs, strict=True)]
        likely = [{token: found.logprob for token, found in at.items()} for at in answer.logprobs]
        return self._build(request, list(answer.token_ids), chosen, likely, answer.finish_reason, version)

    def read_choice(self, request: Request, choice: Mapping[str, Any], version: int) -> Completion:
        """An element of `choices` of /v1/completions, with ids for tokens."""
        logps, reason = choice["logprobs"], choice["finish_reason"]
        likely = [
            {int(token.removeprefix("token_id:")): value for token, value in at.items()}
            for at in logps["top_logprobs"]
        ]
        return self._build(request, choice["token_ids"], logps["token_logprobs"], likely, reason, version)

    def _build(
        self,
        request: Request,
        token_ids: list[int],
        logps: list[float],
        likely: list[dict[int, float]],
        reason: str,
        version: int,
    ) -> Completion:
        assert len(token_ids) == len(logps), (len(token_ids), len(logps))
        top = [most_likely(at, request) for at in likely] if request.sampling.top_logps else None
        reason = reason if reason in FINISHED else "abort"
        return Completion(token_ids, logps, reason, self.text(request, token_ids), top, version)


def tail(request: Request) -> list[int]:
    """The end of the prompt that the answer's text continues."""
    return request.token_ids[len(request.token_ids) - request.continued :]


def most_likely(logps: Mapping[int, float], request: Request) -> dict[int, float]:
    """As many as were asked for; vLLM adds the token that was drawn."""
    return dict(sorted(logps.items(), key=lambda item: -item[1])[: request.sampling.top_logps])
