"""Draws tokens: rows of different settings in one step, each number fixed by seed, answer and token.

Shapes: R = rows, V = vocabulary. Not here: when an answer ends (decoder.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.rollout.types import Sampling

ALL_ONES = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
FRACTION_BITS = 52
BLOCK = 128  # tokens whose probabilities are summed up first
TIES = 64  # tokens just as likely as the last of the top-k, at most
CANDIDATES = 128  # most likely tokens looked at first for a nucleus
PROMPT = 1 << 20  # more than an answer has tokens, times which fits into int32


def signed(number: int) -> int:
    """The lowest 64 bits, as int64 holds them."""
    number &= ALL_ONES
    return number - (1 << 64) if number >> 63 else number


def mix(number: int) -> int:
    """The finaliser of splitmix64: 64 bits in, 64 well mixed bits out.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators, doi:10.1145/2714064.2660195.
    """
    number &= ALL_ONES
    for shift, factor in MIXERS:
        number = (number ^ (number >> shift)) * factor & ALL_ONES
    return number ^ (number >> 31)


def answer_key(seed: int, answer: int) -> int:
    """The key of an answer's draws, as int64."""
    return signed(mix(mix(seed + GOLDEN) + answer * GOLDEN))


def uniform(keys_R: Tensor, steps_R: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 [R], of int64 keys and token numbers: splitmix64 seeded by the key."""
    x = keys_R + (steps_R + 1) * signed(GOLDEN)
    for shift, factor in MIXERS:
        x = (x ^ logical_shift(x, shift)) * signed(factor)
    x = x ^ logical_shift(x, 31)
    return logical_shift(x, 64 - FRACTION_BITS).double() * 2.0**-FRACTION_BITS


def logical_shift(x: Tensor, bits: int) -> Tensor:
    """int64 shifted right with zeros coming in; torch's own operator repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, slots=True)
class Shape:
    """Settings of R rows, each [R]; None where no row asks for it. Greedy rows have a temperature of 1."""

    greedy: Tensor | None  # bool
    temperature: Tensor | None
    penalty: Tensor | None
    frequency: Tensor | None
    presence: Tensor | None
    top_k: Tensor | None
    min_p: Tensor | None
    top_p: Tensor | None
    all_greedy: bool
    top_logps: int  # the largest number that a row wants
    most_top_k: int  # the largest that cuts
    cuts_all: bool  # whether there is one for every row

    @property
    def is_plain(self) -> bool:
        """Whether the distribution stays as the penalties leave it."""
        return all(column is None for column in (self.temperature, self.top_k, self.min_p, self.top_p))

    @property
    def has_penalty(self) -> bool:
        return any(column is not None for column in (self.penalty, self.frequency, self.presence))

    @classmethod
    def of(cls, settings: Sequence[Sampling], vocabulary: int, device: torch.device) -> "Shape":
        def column(values: Sequence[float], neutral: float, dtype: torch.dtype) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        greedy = [s.temperature == 0 for s in settings]
        drawn = [not g for g in greedy]
        drawn = [s if s.temperature else replace(s, top_k=0, min_p=0.0, top_p=1.0) for s in settings]
        top_k = [s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in drawn]
        return cls(
            greedy=column([s.temperature == 0 for s in settings], False, torch.bool),
            temperature=column([s.temperature or 1.0 for s in settings], 1.0, torch.float32),
            penalty=column([s.repetition_penalty for s in settings], 1.0, torch.float32),
            frequency=column([s.frequency_penalty for s in settings], 0.0, torch.float32),
            presence=column([s.presence_penalty for s in settings], 0.0, torch.float32),
            top_k=column(top_k, vocabulary, torch.int64),
            min_p=column([s.min_p for s in drawn], 0.0, torch.float32),
            top_p=column([s.top_p for s in drawn], 1.0, torch.float32),
            all_greedy=all(s.temperature == 0 for s in settings),
            top_logps=min(max(s.top_logps for s in settings), vocabulary),
            most_top_k=max((k for k in top_k if k < vocabulary), default=0),
            cuts_all=all(k < vocabulary for k in top_k),
        )  # fmt: skip


class Marks:
    """Which tokens rows have, of R at most: a table of int32 [R, V], made where a penalty asks for it.

    A number counts how often the answer has the token, with PROMPT added where the prompt has it.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.table: Tensor | None = None

    def begin(
        self, row: int, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], vocabulary: int
    ) -> None:
        """What a row has read."""
        if sampling.repetition_penalty == 1 and not (sampling.frequency_penalty or sampling.presence_penalty):
            return
        if self.table is None:
            self.table = torch.zeros(self.rows, vocabulary, dtype=torch.int32, device=self.device)
        counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=vocabulary).int()
        counts[torch.tensor(prompt)] += PROMPT
        self.table[row] = counts.to(self.device)

    def of(self, span: slice) -> Tensor:
        """A view of some rows, where one of them has a penalty."""
        assert self.table is not None
        return self.table[span]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew: token ids and log-probabilities [R]; the most likely ones [R, n] where wanted."""

    ids: Tensor
    logps: Tensor
    top_ids: Tensor | None
    top_logps: Tensor | None


def draw(logits_RV: Tensor, shape: Shape, uniform_R: Tensor, marks_RV: Tensor | None) -> Drawn:
    """One token for each row. `marks_RV`: of Marks, where a penalty is asked for.

    Log-probabilities are those of the distribution after all settings; a greedy row, whose distribution would
    be a single token, tells those after the penalties alone.
    """
    scores = logits_RV if marks_RV is None else penalised(logits_RV.float(), shape, marks_RV)
    scores, ids_RC = likeliest(scores, shape)
    scores = scores if shape.is_plain else shaped(scores.float(), shape)
    probs = scores.softmax(-1, dtype=torch.float32)
    picked = None if shape.all_greedy else pick(probs, uniform_R)
    if shape.greedy is not None:
        best = scores.argmax(-1)
        picked = best if picked is None else torch.where(shape.greedy, best, picked)
    assert picked is not None
    chosen = probs.gather(1, picked[:, None])[:, 0].log()
    if ids_RC is not None:
        picked = ids_RC.gather(1, picked[:, None])[:, 0]
    if not shape.top_logps:
        return Drawn(picked, chosen, None, None)
    top_logps, top_ids = probs.log_().topk(min(shape.top_logps, probs.shape[1]))
    return Drawn(picked, chosen, top_ids if ids_RC is None else ids_RC.gather(1, top_ids), top_logps)


def likeliest(scores_RV: Tensor, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Scores and ids [R, C] of all that top-k leaves of the rows, in the order of ids; else all, without ids.

    Few more than the largest k are enough: as many as may be just as likely as the last one.
    """
    width = shape.most_top_k + TIES
    if not shape.cuts_all or width >= scores_RV.shape[1]:
        return scores_RV, None
    top = scores_RV.topk(width)
    ids_RC, order = top.indices.sort(-1)
    return top.values.gather(1, order), ids_RC


def pick(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """[R] the first token that brings the sum of probabilities above the number; never one of probability 0.

    Sums in float64: in float32 the tail of a large vocabulary would be rounded away. They are first taken of
    blocks, and then of the tokens in the block that has the number.
    """
    if probs_RV.shape[1] % BLOCK:
        probs_RV = F.pad(probs_RV, (0, -probs_RV.shape[1] % BLOCK))
    blocks = probs_RV.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted_R1 = below(uniform_R[:, None] * sums[:, -1:], sums)
    block_R1 = torch.searchsorted(sums, wanted_R1, right=True)
    before_R1 = F.pad(sums, (1, 0)).gather(1, block_R1)
    tokens = blocks.gather(1, block_R1[:, :, None].expand(-1, 1, BLOCK))[:, 0]
    inner = before_R1 + tokens.double().cumsum(-1)
    inside_R1 = torch.searchsorted(inner, below(wanted_R1, inner), right=True)
    return (block_R1 * BLOCK + inside_R1)[:, 0]


def below(wanted_R1: Tensor, sums: Tensor) -> Tensor:
    """The number, less than the last sum [R, n] whatever rounding did: some sum then is above it."""
    last_R1 = sums[:, -1:]
    return torch.minimum(wanted_R1, last_R1.nextafter(torch.zeros_like(last_R1)))


def shaped(scores: Tensor, shape: Shape) -> Tensor:
    """[R, V or C] scores after temperature, top-k, min-p and top-p, in this order; -inf = impossible.

    Sources: top-p arXiv:1904.09751, min-p arXiv:2407.01082.
    """
    if shape.temperature is not None:
        scores = scores / shape.temperature[:, None]
    floors = []
    if shape.top_k is not None:
        ranked = scores.topk(shape.most_top_k).values
        kept = ranked.gather(1, shape.top_k.clamp(max=shape.most_top_k)[:, None] - 1)
        floors.append(torch.where(shape.top_k[:, None] > shape.most_top_k, -torch.inf, kept))
    if shape.min_p is not None:
        floors.append(scores.amax(-1, keepdim=True) + shape.min_p[:, None].log())
    for floor in floors:
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if shape.top_p is None:
        return scores
    return scores.masked_fill(scores < nucleus_floor(scores, shape.top_p), -torch.inf)


def penalised(scores: Tensor, shape: Shape, marks_RV: Tensor) -> Tensor:
    """[R, V] scores after the penalties.

    Sources: repetition penalty arXiv:1909.05858 section 4.1, the others
    https://platform.openai.com/docs/api-reference/chat/create.
    """
    if shape.penalty is not None:
        penalty = shape.penalty[:, None]
        lower = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(marks_RV > 0, lower, scores)
    counts_RV = marks_RV % PROMPT
    if shape.frequency is not None:
        scores = scores - shape.frequency[:, None] * counts_RV
    if shape.presence is not None:
        scores = scores - shape.presence[:, None] * (counts_RV > 0)
    return scores


def nucleus_floor(scores: Tensor, top_p_R: Tensor) -> Tensor:
    """[R, 1]: the lowest score of the smallest set of likely tokens whose probability reaches top_p."""
    uncut_R = top_p_R >= 1
    total = scores.logsumexp(-1, keepdim=True)
    width = min(CANDIDATES, scores.shape[-1])
    while True:
        ranked = scores.topk(width).values  # sorted
        sums = (ranked - total).exp().cumsum(-1)
        if width == scores.shape[-1] or bool(((sums[:, -1] >= top_p_R) | uncut_R).all()):
            break
        width = min(8 * width, scores.shape[-1])
    # Tokens with less than top_p before them; the first one always, whatever top_p is.
    count = (sums < top_p_R[:, None]).sum(-1, keepdim=True)
    return ranked.gather(1, count.clamp(max=width - 1)).masked_fill(uncut_R[:, None], -torch.inf)
