"""How evenly the routers of a mixture-of-experts model spread tokens over experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swift.batch import Batch


def segment_balance(router_logits: Sequence[Tensor], batch: Batch, experts_per_token: int) -> Tensor:
    """[S] E * sum over experts of f_e * p_e, for each segment by itself; differentiable through p_e alone.

    `router_logits`: [T, E] for each layer. f_e counts the choices of expert e and p_e sums its probability,
    both divided by tokens and layers of the segment, so perfect balance gives `experts_per_token`.

    Source: Switch Transformers, arXiv:2101.03961 eq. 4-6, averaged over layers before the product as
    transformers' `load_balancing_loss_func` does; by sequence as DeepSeek-V3, arXiv:2412.19437 eq. 17-20. The
    product is not linear, so over a micro-batch it would depend on which rows share one; a segment does not.
    """
    num_experts = router_logits[0].shape[-1]
    wide = torch.promote_types(router_logits[0].dtype, torch.float32)
    chosen_SE = torch.zeros(batch.num_segments, num_experts, dtype=wide, device=router_logits[0].device)
    probability_SE = chosen_SE.clone()
    for logits_TE in router_logits:
        probability_TE = torch.softmax(logits_TE.to(wide), -1)
        picks_TE = torch.zeros_like(probability_TE).scatter(
            1, probability_TE.detach().topk(experts_per_token, -1).indices, 1.0
        )
        chosen_SE = chosen_SE.index_add(0, batch.segment_ids, picks_TE)
        probability_SE = probability_SE.index_add(0, batch.segment_ids, probability_TE)
    rows_S1 = batch.segment_lengths()[:, None] * len(router_logits)
    return num_experts * (chosen_SE / rows_S1 * probability_SE / rows_S1).sum(-1)
