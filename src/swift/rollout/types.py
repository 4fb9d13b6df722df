"""What is asked of a model that answers, and what it answers: token ids, never text.

Chat templates, tools and stop words of a template are applied above; whoever trains and whoever samples see
the same ids.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn. The defaults are the model's own distribution.

    Everything that shapes the distribution is applied in this order: penalties, temperature, top-k, min-p,
    top-p.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 = the most likely token, told with what it has before any cut
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in prompt and answer
    frequency_penalty: float = 0.0  # of tokens in the answer, for each time they are there
    presence_penalty: float = 0.0  # of tokens in the answer
    stop: tuple[str, ...] = ()  # texts that end an answer, besides the tokens that always do
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0  # with the number of the answer and of the token it fixes every draw
    top_logps: int = 0  # most likely tokens told at each position


class Guide(Protocol):
    """What one answer may go on with."""

    def allowed(self) -> Tensor:
        """bool [V] on the CPU, V as the tokenizer counts; never all False."""
        ...

    def take(self, token_id: int) -> None:
        """Hears of the next token."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how often it is answered. Answer number i draws from (seed, first + i)."""

    token_ids: list[int]
    sampling: Sampling
    count: int = 1
    first: int = 0
    continued: int = 0  # tokens at the prompt's end whose text the answer continues
    guide: Callable[[], Guide] | None = None  # for each answer; our own decoder follows it


def join_requests(requests: Iterable[Request]) -> list[Request]:
    """Neighbours that answer the same prompt by consecutive numbers become one."""
    joined: list[Request] = []
    for request in requests:
        last = joined[-1] if joined else request
        is_same = (last.token_ids, last.sampling) == (request.token_ids, request.sampling)
        if is_same and last.first + last.count == request.first:
            joined[-1] = replace(last, count=last.count + request.count)
        else:
            joined.append(request)
    return joined


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. Log-probabilities are those of the distribution that it was drawn from."""

    token_ids: list[int]  # with the token that ended it
    logps: list[float]
    finish_reason: str  # "stop", "length", or "abort" when nobody waited for it any more
    text: str = ""  # without the token or the stop text that ended it
    top_logps: list[dict[int, float]] | None = None  # a position: token id -> log-probability
    version: int = 0  # of the weights


@dataclass(frozen=True, slots=True)
class Token:
    """A new token of answer number `index` of a request."""

    index: int
    token_id: int
    logp: float
    text: str  # what can be shown now: empty while a character or what may be a stop text is incomplete
    top_logps: dict[int, float] | None


@dataclass(frozen=True, slots=True)
class End:
    """An answer is complete; `text` is what no Token has shown yet."""

    index: int
    text: str
    completion: Completion
