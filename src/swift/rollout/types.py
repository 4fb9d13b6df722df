"""What is asked of a model that answers, and what it answers: token ids, never text.

Chat templates, tools and stop words of a template are applied above; whoever trains and whoever samples see
the same ids.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn. The defaults are the model's own distribution.

    Everything that shapes the distribution is applied in this order: repetition penalty, temperature, top-k,
    min-p, top-p.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 = the most likely token, told with what it has before any cut
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end an answer, besides the tokens that always do
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0  # with the number of the answer and of the token it fixes every draw
    top_logps: int = 0  # most likely tokens told at each position


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how often it is answered. Answer number i draws from (seed, first + i)."""

    token_ids: list[int]
    sampling: Sampling
    count: int = 1
    first: int = 0
    continued: int = 0  # tokens at the prompt's end whose text the answer continues


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. Log-probabilities are those of the distribution that it was drawn from."""

    token_ids: list[int]  # with the token that ended it
    logps: list[float]
    finish_reason: str  # "stop", "length", or "abort" when nobody waited for it any more
    text: str = ""  # without the token or the stop text that ended it
    top_logps: list[dict[int, float]] | None = None  # a position: token id -> log-probability
    version: int = 0  # of the weights
