"""Spreads a model over processes.

DDP: every process holds everything. FSDP2: every process holds a slice of each tensor. Both average the
gradients of all processes (FSDP2 could sum, but not on gloo): an engine multiplies its loss by their number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from swift.engines.ranks import Ranks


@dataclass(frozen=True)
class Wrapped:
    """`module` is what is called; `scale` makes the library's reduction a plain sum over ranks."""

    module: nn.Module
    scale: float

    @contextmanager
    def gradients(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. DDP exchanges gradients with the last one alone."""
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            with self.module.no_sync():
                yield
        else:
            yield


def wrap(model: nn.Module, base: PreTrainedModel, ranks: Ranks, fsdp: bool) -> Wrapped:
    """`model` as it runs on several processes; itself on one. `base` is the model below any adapters."""
    device = next(model.parameters()).device
    if fsdp:
        mesh = init_device_mesh(device.type, (ranks.world,))
        names = set(base._no_split_modules or ())  # the decoder layers, as transformers itself names them
        blocks = [m for m in base.modules() if type(m).__name__ in names]
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
        return Wrapped(model, float(ranks.world))
    if ranks.world == 1:
        return Wrapped(model, 1.0)
    # Buffers (rotary frequencies) are equal by construction; sending them each step would only cost time.
    return Wrapped(DistributedDataParallel(model, broadcast_buffers=False), float(ranks.world))


def grad_norm(parameters: list[nn.Parameter], limit: float) -> float:
    """Clips all gradients to one global 2-norm; the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
