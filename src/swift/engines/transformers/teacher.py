"""A teacher that runs beside the model, for objectives that compare the two (objectives/distill.py).

Only what enters its output layer is kept of it: logits are made when they are asked for, some rows at a time.
Shapes: N = tokens with logits, n = some of N, D = width of the teacher.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# Fields of configs of models that change logits after their output layer.
BENDS_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def run_teacher(
    teacher: PreTrainedModel, arguments: Mapping[str, Any], rows_N: Tensor
) -> Callable[[slice], Tensor]:
    """Rows of N -> the teacher's logits there. `rows_N`: places of these tokens in the model's own layout."""
    head = teacher.get_output_embeddings()
    entered: list[Tensor] = []

    def keep_one(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        entered.append(inputs[0].flatten(0, 1)[rows_N])
        return (inputs[0][:, :1],)

    bends = any(getattr(teacher.config.get_text_config(), name, None) for name in BENDS_LOGITS)
    handle = None if bends else head.register_forward_pre_hook(keep_one)
    try:
        with torch.no_grad():
            logits = teacher(**arguments, use_cache=False).logits
    finally:
        if handle:
            handle.remove()
    if bends:  # the output layer alone would not do, so here two whole tensors of logits do exist
        logits_NV = logits.flatten(0, 1)[rows_N]
        return lambda rows: logits_NV[rows]
    weight = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight
    weight, hidden_ND = weight.detach(), entered[0].to(weight.dtype)
    bias = None if head.bias is None else head.bias.detach()
    return lambda rows: F.linear(hidden_ND[rows], weight, bias)
