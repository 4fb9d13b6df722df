"""Requests and answers in vLLM's terms, the same in its own process and over HTTP."""

from collections.abc import Mapping, Sequence
from typing import Any

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


def sampling_fields(request: Request, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """vLLM's SamplingParams. `stop_token_ids` always end an answer; what config.json calls eos does not."""
    sampling = request.sampling
    return {
        "n": request.count,
        "seed": first_seed(request),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted({*sampling.stop_token_ids, *stop_token_ids}),
        "ignore_eos": True,
        "logprobs": sampling.top_logps,
        "skip_special_tokens": True,
    }


def read_answer(answer: Any, top: int, version: int) -> Completion:
    """vLLM's CompletionOutput."""
    chosen = [at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs, strict=True)]
    likely = [{token: found.logprob for token, found in at.items()} for at in answer.logprobs]
    return build(list(answer.token_ids), chosen, likely, answer.finish_reason, answer.text, top, version)


def read_choice(choice: Mapping[str, Any], top: int, version: int) -> Completion:
    """An element of `choices` of /v1/completions, with ids for tokens."""
    logps = choice["logprobs"]
    likely = [
        {int(token.removeprefix("token_id:")): value for token, value in at.items()}
        for at in logps["top_logprobs"]
    ]
    chosen, reason = logps["token_logprobs"], choice["finish_reason"]
    return build(choice["token_ids"], chosen, likely, reason, choice["text"], top, version)


def build(
    token_ids: list[int],
    logps: list[float],
    likely: list[dict[int, float]],
    reason: str | None,
    text: str,
    top: int,
    version: int,
) -> Completion:
    """A Completion with the `top` most likely tokens of each position; vLLM tells the drawn one too."""
    assert len(token_ids) == len(logps), (len(token_ids), len(logps))
    best = [dict(sorted(at.items(), key=lambda item: -item[1])[:top]) for at in likely] if top else None
    return Completion(token_ids, logps, reason if reason in FINISHED else "abort", text, best, version)
