"""`Batch`: the one tensor layout. Flat tokens with segment ids; padding is an engine's detail.

Shapes: T = tokens of the micro-batch, S = sequences (segments) in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch as flat tokens."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, already shifted: the token to predict at t; IGNORED = not trained
    segment_ids: Tensor  # [T] int64 in [0, S), non-decreasing
    num_segments: int
    token: dict[str, Tensor] = field(default_factory=dict)  # each [T]: loss_scale, ref_logps, ...
    segment: dict[str, Tensor] = field(default_factory=dict)  # each [S, ...]: label, margin, kl, ...

    @property
    def trained(self) -> Tensor:
        """[T] bool: positions whose next token is predicted in the loss."""
        return self.labels != IGNORED

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    def segment_lengths(self) -> Tensor:
        """[S] int64: tokens of each segment."""
        return torch.bincount(self.segment_ids, minlength=self.num_segments)

    def positions(self) -> Tensor:
        """[T] int64: position of each token inside its segment."""
        lengths = self.segment_lengths()
        starts = torch.cumsum(lengths, 0) - lengths
        return torch.arange(self.num_tokens, device=self.input_ids.device) - starts[self.segment_ids]

    def to(self, device: torch.device | str) -> "Batch":
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            segment_ids=self.segment_ids.to(device),
            token={k: v.to(device) for k, v in self.token.items()},
            segment={k: v.to(device) for k, v in self.segment.items()},
        )

    def take(self, chosen: Tensor) -> "Batch":
        """The segments of these numbers, int64, which rise."""
        keep_T = torch.isin(self.segment_ids, chosen)
        return Batch(
            self.input_ids[keep_T],
            self.labels[keep_T],
            torch.searchsorted(chosen, self.segment_ids[keep_T]),
            len(chosen),
            {name: values[keep_T] for name, values in self.token.items()},
            {name: values[chosen] for name, values in self.segment.items()},
        )


def join(batches: Sequence[Batch]) -> Batch:
    """The segments of all batches, which have the same columns, one after the other."""
    firsts = accumulate((batch.num_segments for batch in batches), initial=0)
    return Batch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.segment_ids + first for batch, first in zip(batches, firsts, strict=False)]),
        sum(batch.num_segments for batch in batches),
        {name: torch.cat([batch.token[name] for batch in batches]) for name in batches[0].token},
        {name: torch.cat([batch.segment[name] for batch in batches]) for name in batches[0].segment},
    )
