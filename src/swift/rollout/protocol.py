"""The seam between whoever wants answers and whatever gives them: the trained model itself, or vLLM."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from swift.rollout.types import Completion, Request


class RolloutEngine(Protocol):
    """Called by every rank at the same points; each has requests of its own, or none."""

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The answers to each request, in order."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Takes over full tensors under their HuggingFace names, adapters merged; every rank exhausts them.

        What was computed with the old ones is forgotten: prefix caches above all. One that answers with the
        trained model itself takes nothing.
        """
        ...

    def sleep(self) -> None:
        """Frees what only answering needs, while the model is trained."""
        ...

    def wake(self) -> None:
        """Undoes `sleep`."""
        ...

    def close(self) -> None:
        """Ends processes and connections, once."""
        ...
