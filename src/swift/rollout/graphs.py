"""CUDA graphs of the decoding step: the GPU gets one order for all of it, not one for each kernel.

A graph is recorded for some numbers of rows; a step with fewer runs the next larger one, whose idle rows have
length 0 and cost little. Shapes: R = rows in flight, V = vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from swift.utils.log import warn_once

FINE = 64  # rows: numbers below it are powers of two, those above it multiples


def padded_rows(size: int, most: int) -> int:
    """The number of rows that a graph is recorded for."""
    padded = 1 << max(size - 1, 0).bit_length() if size <= FINE else -(-size // FINE) * FINE
    return min(padded, most)


def can_record(model: nn.Module) -> bool:
    """Whether all that `model` does is done by its GPU. What hooks do on the host, no graph would repeat."""
    return not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Graphs:
    """Records a step, a function of the number of rows that returns logits [R, V], and plays it again.

    Everything that it reads has to stay where it is for as long as this lives: weights, keys and values, and
    the tensors that say what is in which row. The step is not kept: who owns this would never be freed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.works = True

    def run(self, step: Callable[[int], Tensor], rows: int) -> Tensor:
        """[R, V], good until the next call."""
        padded = padded_rows(rows, self.most)
        if padded not in self.recorded and self.works:
            try:
                self.recorded[padded] = self._record(step, padded)
            except RuntimeError as error:
                self.works = False
                reason = str(error).splitlines()[0]
                warn_once(f"decoding without CUDA graphs, which this model cannot be recorded in: {reason}")
        if not self.works:
            return step(rows)
        graph, logits = self.recorded[padded]
        graph.replay()
        return logits[:rows]

    def _record(self, step: Callable[[int], Tensor], rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Copies of weights that autocast keeps would be freed while the graph still reads them.
        kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(rows)  # compiles kernels and chooses algorithms, which no recording may
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                logits = step(rows)
        finally:
            torch.set_autocast_cache_enabled(kept)
        return graph, logits
