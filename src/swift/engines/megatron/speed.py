"""Two functions of megatron-core that are slow without apex and transformer-engine, in other words.

Both are those of megatron-core 0.16 to 0.19; tests/invariance/test_megatron_layers.py fails when they change.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def patch() -> None:
    """After megatron-core has been imported."""
    clip: Any = import_module("megatron.core.optimizer.clip_grads")
    utils: Any = import_module("megatron.core.utils")
    if clip.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip.l2_norm_impl = l2_norm
    if torch.cuda.is_available():
        # Eight kernels on queries and keys become one.
        rope: Any = import_module("megatron.core.models.common.embeddings.rope_utils")
        rope._apply_rotary_pos_emb_bshd = torch.compile(rope._apply_rotary_pos_emb_bshd, dynamic=True)


def l2_norm(
    _chunk: int, _overflow: Tensor, tensors: list[list[Tensor]], _each: bool, *_: Any
) -> tuple[Tensor, None]:
    """[1] norm of all tensors, which stays on the device: the original waits for the norm of each of them.

    Source: github.com/NVIDIA/Megatron-LM megatron/core/utils.py, local_multi_tensor_l2_norm.
    """
    norms = torch._foreach_norm(tensors[0])  # type: ignore[attr-defined]
    return torch.linalg.vector_norm(torch.stack(norms)).float()[None], None
