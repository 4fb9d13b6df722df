"""Spreads a model over processes. DeepSpeed does it in deepspeed.py.

DDP: every process holds everything. FSDP2: every process holds a slice of each tensor. Both average the
gradients of all processes (FSDP2 could sum, but not on gloo): the loss is multiplied by their number.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from swift.config.option import require_package
from swift.config.parallel import ParallelConfig
from swift.engines.ranks import Ranks
from swift.engines.slices import Part, Reader, take_parts

MASTER = "master"  # beside the moments: float32 weights that an engine keeps apart from the model's


@dataclass(frozen=True)
class Moments:
    """An optimizer's state: tensors as `parameter|moment`, and what is no tensor by parameter and moment."""

    parts: dict[str, Part]
    plain: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Wrapped:
    """`module` is what is called; `scale` makes the library's reduction a plain sum over ranks.

    `scaler` keeps float16 gradients in range: it scales losses up, gradients down, and skips what overflows.
    """

    module: nn.Module
    optimizer: Optimizer
    scale: float
    scaler: GradScaler

    @contextmanager
    def gradients(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. DDP exchanges gradients with the last one alone."""
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            with self.module.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor) -> None:
        """`loss` is divided by the units of the whole step."""
        self.scaler.scale(loss * self.scale).backward()

    def step(self, limit: float) -> tuple[float, bool]:
        """Clips to a global norm of `limit` (0 = never), steps and clears the gradients.

        The norm before clipping, and whether weights have changed: not where float16 overflowed.
        """
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        norm = float(self.gather(torch.nn.utils.clip_grad_norm_(trained, limit or float("inf"))))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, math.isfinite(norm) or not self.scaler.is_enabled()

    def shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def gather(self, tensor: Tensor) -> Tensor:
        """The whole of a weight, from the slices of all ranks. Called by all of them."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @contextmanager
    def whole(self, model: nn.Module, run: Callable[[], object]) -> Iterator[None]:
        """Inside it every process has all of `model`. `run` calls it once; all processes do so together."""
        if not isinstance(model, FSDPModule):
            yield
            return
        model.set_reshard_after_forward(False)
        run()  # gathers each part where it is used, as public calls to do so expect parts that have run
        try:
            yield
        finally:
            for part in model.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()
            model.set_reshard_after_forward(True)
            model.set_reshard_after_forward(False, recurse=False)  # as before: backward begins with the root

    def take_moments(self, model: nn.Module, ranks: Ranks) -> Moments:
        """The optimizer's state as this rank writes it. Called by all ranks."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}|{key}"] = value
                else:
                    plain.setdefault(name, {})[key] = value
        return Moments(take_parts(tensors, rank=ranks.rank, world=ranks.world), plain)

    def load_moments(self, model: nn.Module, reader: Reader, plain: dict[str, dict[str, Any]]) -> None:
        """The inverse of `take_moments`, into any number of processes."""
        parameters = dict(model.named_parameters())
        steps_on_device = {
            parameter
            for group in self.optimizer.param_groups
            if group.get("fused") or group.get("capturable")
            for parameter in group["params"]
        }
        for name, values in plain.items():
            self.optimizer.state[parameters[name]].update(values)
        for full_name in reader.shapes:
            name, key = full_name.rsplit("|", 1)
            if key == MASTER:
                continue
            parameter = parameters[name]
            value = reader.read(full_name, parameter)
            # The number of steps is on the CPU, unless a kernel on the GPU wants it there.
            stays = value.ndim == 0 and parameter not in steps_on_device
            self.optimizer.state[parameter][key] = value if stays else value.to(parameter.device)

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)


Wrapper = Callable[..., Wrapped]  # what spreads a model: `wrap` below, or that of deepspeed.py


def wrap(
    model: nn.Module,
    base: PreTrainedModel,
    *,
    ranks: Ranks,
    compute: torch.dtype,
    build_optimizer: Callable[[], Optimizer],
    parallel: ParallelConfig,
) -> Wrapped:
    """`model` as it runs on several processes; itself on one. `base` is the model below any adapters.

    `compute`: dtype of the arithmetic. FSDP2 sends wider weights in it, and adds gradients in float32.
    """
    device = next(model.parameters()).device
    module = model
    if parallel.fsdp and ranks.world > 1:
        shard(model, base, ranks, compute)
    elif ranks.world > 1:
        # Buffers (rotary frequencies) are equal by construction; sending them each step would only cost time.
        unused = parallel.ddp_find_unused_parameters
        module = DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=unused,
            bucket_cap_mb=parallel.ddp_bucket_cap_mb,
        )  # fmt: skip
    scaler = GradScaler(device.type, enabled=compute == torch.float16)
    return Wrapped(module, build_optimizer(), float(ranks.world), scaler)


def shard(model: nn.Module, base: PreTrainedModel, ranks: Ranks, compute: torch.dtype) -> None:
    """Leaves each process a slice of every tensor of `model`, in place (FSDP2)."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.world,))
    names = set(base._no_split_modules or ())  # the decoder layers, as transformers itself names them
    blocks = [m for m in base.modules() if type(m).__name__ in names]
    mixed = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy() if compute == base.dtype else mixed)


def load_zero() -> ModuleType:
    """deepspeed.py, or in words what is missing for it."""
    require_package("deepspeed", flag="--deepspeed", install="swiftune[deepspeed]")
    return import_module("swift.engines.transformers.deepspeed")
