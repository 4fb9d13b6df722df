"""Activations that wait for the backward pass in the memory of the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**16  # elements; less is not worth the two copies


@contextmanager
def activations_on_cpu(active: bool) -> Iterator[None]:
    """What autograd saves inside it is copied to pinned memory, and back when it is needed; weights stay.

    With recomputation of layers that is one tensor [T, D] a layer.
    """
    if not active:
        yield
        return

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        if is_weight or tensor.numel() < SMALLEST or not tensor.is_cuda:
            return tensor.device, tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return tensor.device, copy.copy_(tensor, non_blocking=True)

    with saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0], non_blocking=True)):
        yield
