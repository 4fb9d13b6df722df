"""What megatron-core has to find when it is imported; on a machine without GPUs, a CPU that answers as one.

megatron-core (0.16 to 0.19) asks torch.cuda for devices, streams, events and random states without asking
whether there is a GPU. Each patch below answers calls that ended a run on CPU and gloo; the package is
untouched, and nothing is patched where a GPU is. See NVIDIA/Megatron-LM pull request 6270.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from swift.config.option import ConfigError
from swift.engines.megatron import implementation, speed, wgrad
from swift.utils import env

CPU = torch.device("cpu")
FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "empty_like",
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "linspace", "as_tensor",
    "empty_strided", "eye", "randperm",
)  # fmt: skip


def make_ready() -> None:
    """Imports megatron-core into a process that suits it, without remarks on packages that are missing."""
    # One hardware queue: exchanges between tensor-parallel ranks then overlap with the products they should.
    env.set_defaults({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        # megatron-core compiles small functions, which costs minutes and gains nothing here.
        env.set_defaults({"TORCHDYNAMO_DISABLE": "1"})
        patch_torch()
    else:
        wgrad.install()
    implementation.trouble()
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        import_module("megatron.core.models.gpt")
    except ImportError as error:  # 0.18 and 0.19 want triton, which torch for CPUs does not bring along
        raise ConfigError(
            f"megatron-core cannot be imported: {error}", hint="pip install triton, or 'megatron-core<0.17'"
        ) from error
    logging.getLogger("megatron").setLevel(logging.ERROR)
    mend_missing_names()
    speed.patch()
    if on_cpu:
        patch_megatron()


def mend_missing_names() -> None:
    """Two modules name functions of transformer-engine even where there is none.

    The router of 0.16, and up to 0.19 the recomputation of parts of a layer, which asks for float8.
    """
    utils: Any = import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None
    random: Any = import_module("megatron.core.tensor_parallel.random")
    if not hasattr(random, "FP8GlobalStateManager"):
        random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=answering(False))
        random.activation_recompute_forward = random.fp8_autocast = answering(contextlib.nullcontext())


class Stream:
    """A CUDA stream or event, where everything happens in order anyway."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: "Stream") -> float:
        return 0.0

    def record_event(self, event: "Stream | None" = None) -> "Stream":
        return event or Stream()

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    record = wait = synchronize = wait_stream = wait_event = _nothing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


def names_gpu(device: Any) -> bool:
    """Whether a device argument, in any of its spellings, means a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def answering(value: Any) -> Callable[..., Any]:
    """A function that takes anything and returns `value`."""
    return lambda *_, **__: value


def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of tensors that makes on the CPU what was meant for a GPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if names_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def patch_torch() -> None:
    """torch.cuda and its tensors, answered by the CPU."""
    with torch.device("cpu"):
        torch.empty(0)  # the first use notes which functions are factories; transformers uses it with "meta"
    cuda: Any = torch.cuda
    cuda.current_device = answering(CPU)
    cuda.get_device_capability = answering((0, 0))
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed_all"):
        setattr(cuda, name, answering(None))
    for name in ("max_memory_allocated", "memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, answering(0))
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = answering(Stream())
    cuda.stream = answering(contextlib.nullcontext())
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    patch_tensor(torch.Tensor)
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    patch_uneven_exchanges()
    wait = dist.barrier
    # Barriers name the GPU that they run on, which gloo refuses.
    dist.barrier = lambda group=None, async_op=False, device_ids=None: wait(group=group, async_op=async_op)  # noqa: ARG005


def patch_uneven_exchanges() -> None:
    """Parts of different lengths, which experts exchange: NCCL takes them, gloo does not."""
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **options: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return gather(parts, tensor, group=group, **options)
        parts[dist.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(parts):
            if part.numel():
                dist.broadcast(part, group=group, group_src=rank)
        return None

    def reduce_scatter(output: torch.Tensor, parts: list[torch.Tensor], **options: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return scatter(output, parts, **options)
        sums = [part.clone() for part in parts]
        for rank, part in enumerate(sums):
            if part.numel():
                dist.reduce(part, group=options["group"], group_dst=rank)
        output.copy_(sums[dist.get_rank(options["group"])])
        return None

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def patch_tensor(tensor: Any) -> None:
    """Moves to a GPU stay on the CPU, and the name of a tensor's type says cuda, which optimizers compare."""
    tensor.cuda = tensor.pin_memory = lambda self, *_, **__: self
    tensor.record_stream = answering(None)
    move, name_of = tensor.to, tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        places = tuple(CPU if names_gpu(a) and not isinstance(a, int) else a for a in args)
        if names_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
        return move(self, *places, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = name_of(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    tensor.to, tensor.type = to, type_


def patch_megatron() -> None:
    """The two places that keep to CUDA by themselves: random states, and the sizes that experts exchange."""
    random = import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]

    def to_host(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    for name in ("moe_utils", "token_dispatcher"):
        module = import_module(f"megatron.core.transformer.moe.{name}")
        if hasattr(module, "maybe_move_tensor_to_cpu"):
            module.maybe_move_tensor_to_cpu = to_host  # type: ignore[attr-defined]
