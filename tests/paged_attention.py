"""What the kernel over pages computes, by torch's own attention."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """As swift.rollout.kernels.attend_pages."""
    seen = [x[table.long()].transpose(1, 2).flatten(2, 3) for x in (keys, values)]
    seen = [x.repeat_interleave(query.shape[1] // keys.shape[1], 1) for x in seen]
    distance = lengths[:, None] - torch.arange(seen[0].shape[2], device=lengths.device)
    mask = (distance >= 0) & (distance < (window or len(distance[0])))
    for x in seen:  # what nobody has written yet may be anything
        x.masked_fill_(~mask[:, None, :, None], 0)
    return F.scaled_dot_product_attention(
        query[:, :, None], *seen, attn_mask=mask[:, None, None], scale=scale
    )[:, :, 0]
