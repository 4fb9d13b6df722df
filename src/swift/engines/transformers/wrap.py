"""Spreads a model over processes, and gathers its tensors from them again.

DDP: every process holds everything. FSDP2: every process holds a slice of each tensor. Both average the
gradients of all processes (FSDP2 could sum, but not on gloo): an engine multiplies its loss by their number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
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


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor on the CPU, from the slices of all ranks. Called by all of them."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every weight and buffer by name, whole; tied weights stay one tensor. Called by all ranks."""
    whole: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            whole[id(tensor)] = full_tensor(tensor)
        state[name] = whole[id(tensor)]
    return state


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Name of the parameter -> its moments, whole: it does not depend on how many processes there were."""
    return {
        name: {
            k: full_tensor(v) if isinstance(v, Tensor) else v for k, v in optimizer.state[parameter].items()
        }
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_optimizer_state(
    model: nn.Module, optimizer: Optimizer, state: dict[str, dict[str, Tensor]], groups: list[dict[str, Any]]
) -> None:
    """The inverse of `optimizer_state`, into any number of processes. `groups`: engines.optim.progress_of."""
    for name, parameter in model.named_parameters():
        if name in state:
            optimizer.state[parameter] = {k: like(parameter, k, v) for k, v in state[name].items()}
    for group, progress in zip(optimizer.param_groups, groups, strict=True):
        group.update(progress)


def like(parameter: Tensor, name: str, value: Any) -> Any:
    """A saved moment, laid out as its parameter is. Step counts are numbers, AdamW's a tensor on the CPU."""
    if name == "step" or not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor):
        local = value.to(parameter.device)
        return distribute_tensor(local, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def grad_norm(parameters: list[nn.Parameter], limit: float) -> float:
    """Clips all gradients to one global 2-norm; the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
