"""What waits in the memory of the CPU: activations for the backward pass, weights and moments for a step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

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


@contextmanager
def set_aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside it the memory of these tensors is free: their bytes wait on the CPU, and come back to the bit.

    Slices that several tensors share, or that a wrapper looks at by itself, stay the same objects.
    """
    waiting: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        place = storage.data_ptr()
        if storage.nbytes() and place not in waiting:
            waiting[place] = storage, _bytes_of(storage).to("cpu", copy=True)
    for storage, _ in waiting.values():
        storage.resize_(0)
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        for storage, kept in waiting.values():
            storage.resize_(kept.numel())
            _bytes_of(storage).copy_(kept)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
