"""Noise on the embeddings of training batches, in any layout."""

import torch
from torch import Tensor, nn

from swift.batch import Batch


class EmbeddingNoise:
    """Adds uniform noise within alpha / sqrt(L * D) to what an embedding puts out while it trains.

    L = tokens of the token's own segment, D = width. `batch` is set before each forward pass. Noise is drawn
    for the flat tokens in their order, so the layout does not change it, nor (on a CPU) does the way in
    which a step is cut into micro-batches.

    Source: NEFTune, arXiv:2310.05914 algorithm 1.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.batch: Batch | None = None
        embedding.register_forward_hook(self._add)

    def _add(self, embedding: nn.Module, _: object, output_BLD: Tensor) -> Tensor | None:
        if not embedding.training:
            return None
        batch = self.batch
        assert batch is not None, "a training batch came without being announced"
        rows, longest, width = output_BLD.shape
        lengths_T = batch.segment_lengths()[batch.segment_ids]
        noise_TD = torch.rand(batch.num_tokens, width, device=output_BLD.device) * 2 - 1
        noise_TD *= (self.alpha / (lengths_T * width).sqrt())[:, None].to(output_BLD.device)
        noise_TD = noise_TD.to(output_BLD.dtype)
        if rows * longest == batch.num_tokens:
            return output_BLD + noise_TD.view_as(output_BLD)
        assert rows == batch.num_segments, (output_BLD.shape, batch.num_segments)
        index_T = (batch.segment_ids * longest + batch.positions()).to(output_BLD.device)
        return output_BLD.flatten(0, 1).index_add(0, index_T, noise_TD).view_as(output_BLD)
