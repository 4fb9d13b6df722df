"""Prompts that are read together, laid out as one flat row: what all of them begin with is read once.

Shapes: N = tokens read, S = prompts, M = tokens of all prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from swift.engines.attention import Segments

WORTH = 8  # a shared beginning is read once where it saves a larger part than one in this many


@dataclass(frozen=True, slots=True)
class Layout:
    """Which token is where. Lists on the host."""

    ids: list[int]  # [N]
    places: list[int]  # [N] of each token in its prompt
    lengths: list[int]  # of the segments of N: the shared beginning, if any, and the rest of each prompt
    tokens: list[list[int]]  # [S] lists: which of the N a prompt consists of
    shared: int  # tokens of the shared beginning

    @property
    def last(self) -> list[int]:
        """[S] the end of each prompt."""
        return [places[-1] for places in self.tokens]

    @property
    def seen(self) -> list[int]:
        """Which of the N are the keys of each segment, one segment after the other."""
        return [*range(self.shared), *(token for tokens in self.tokens for token in tokens)]

    def segments(self, device: torch.device) -> Segments:
        """Those of the N, with keys of their own where a beginning is shared."""
        if not self.shared:
            return Segments.of(self.lengths, device)
        keys = [self.shared, *map(len, self.tokens)]
        return Segments.of(self.lengths, device, keys=Segments.of(keys, device))


def lay_out(prompts: Sequence[list[int]]) -> Layout:
    """At least the last token of each prompt is read for itself."""
    shared = common_length(prompts)
    total = sum(map(len, prompts))
    if shared * (len(prompts) - 1) * WORTH < total:
        shared = 0
    rests = [prompt[shared:] for prompt in prompts]
    ids, tokens = prompts[0][:shared], []
    for rest in rests:
        tokens.append([*range(shared), *range(len(ids), len(ids) + len(rest))])
        ids += rest
    places = [*range(shared), *(p for prompt in prompts for p in range(shared, len(prompt)))]
    return Layout(ids, places, [shared] * bool(shared) + [len(rest) for rest in rests], tokens, shared)


def common_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens several prompts all begin with, less than the shortest has; 0 for a single one."""
    if len(prompts) == 1:
        return 0
    shortest = min(map(len, prompts))
    columns = zip(*(prompt[: shortest - 1] for prompt in prompts), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
