"""ZeRO through DeepSpeed's own engine: its config, and the same few methods as `wrap.Wrapped` has.

Loaded only with --deepspeed: the package is an extra. Accumulation, optimizer, schedule and batch size stay
ours, so a config may repeat them but not contradict them. Source of the stages: arXiv:1910.02054.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from swift.config.option import ConfigError
from swift.engines.ranks import Ranks
from swift.engines.slices import Part, Reader, to_host
from swift.engines.transformers.wrap import MASTER, Moments
from swift.models.load import HALF
from swift.utils import env

ON_CPU = {"device": "cpu", "pin_memory": True}
AUTO_ZERO3: dict[str, Callable[[int], int]] = {  # "auto" by the width of the model, as in transformers
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}
# What a config may say only as we do it, or leave out, or call "auto".
OURS = {
    "train_batch_size": "the rows that the batch flags make a step",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
}
UNSUPPORTED = (
    "tensor_parallel", "autotp_size", "sequence_parallel_size", "elasticity", "compression_training", "amp",
    "data_efficiency", "curriculum_learning", "torch_autocast", "compile",
)  # fmt: skip


def preset(name: str) -> dict[str, Any] | None:
    """zero1, zero2, zero3, zero2_offload, zero3_offload; None for another name."""
    stage = {"zero1": 1, "zero2": 2, "zero3": 3}.get(name.removesuffix("_offload"))
    offload = name.endswith("_offload")
    if stage is None or (offload and stage == 1):
        return None
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        zero |= dict.fromkeys(AUTO_ZERO3, "auto")
    if offload:
        zero["offload_optimizer"] = ON_CPU
        if stage == 3:
            zero["offload_param"] = ON_CPU
    return {"zero_optimization": zero}


def read_config(text: str) -> dict[str, Any]:
    """The config that --deepspeed names: a preset, a JSON file, or JSON text."""
    found = preset(text)
    if found is not None:
        return found
    path = Path(text).expanduser()
    try:
        config = json.loads(text if text.lstrip().startswith("{") else path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--deepspeed {text} is neither a preset nor a file that can be read",
            hint="zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, a JSON file, or JSON text",
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"--deepspeed {text} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {text} has to hold an object", hint='{"zero_optimization": {...}}')
    return config


def settle(
    text: str,
    *,
    micro_batch: int,
    accumulation: int,
    data_world: int,
    clip: float,
    compute: str | None,
    width: int,
) -> dict[str, Any]:
    """The config with its "auto" values filled in. Raises ConfigError where it contradicts flags.

    `compute`: float16, bfloat16 or float32, None where only the weights will tell. `width`: of the model.
    """
    config = read_config(text)
    values = (micro_batch * accumulation * data_world, micro_batch, accumulation, clip)
    for (name, flag), value in zip(OURS.items(), values, strict=True):
        if config.get(name, "auto") not in ("auto", value):
            raise contradiction(name, config[name], f"{flag}, which is {value}")
    for name in ("optimizer", "scheduler"):
        fixed = {k: v for k, v in config.get(name, {}).get("params", {}).items() if v != "auto"}
        if fixed:
            flag = "--optim, --learning_rate and their like" if name == "optimizer" else "--lr_scheduler_type"
            raise contradiction(f"{name}.params", json.dumps(fixed), flag)
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        enabled = config.get(name, {}).get("enabled", "auto")
        if enabled != "auto" and compute is not None and enabled != (compute == dtype):
            raise contradiction(f"{name}.enabled", json.dumps(enabled), f"--torch_dtype, which is {compute}")
    zero = dict(config.get("zero_optimization", {}))
    for name in zero:
        if zero[name] == "auto":
            if name not in AUTO_ZERO3:
                raise ConfigError(
                    f"--deepspeed: zero_optimization.{name} cannot be auto", hint="give a value"
                )
            zero[name] = AUTO_ZERO3[name](width)
    check_supported(config, zero)
    dropped = {*OURS, "optimizer", "scheduler", "fp16", "bf16"}
    kept = {k: v for k, v in config.items() if k not in dropped}
    precision = {k: {n: v for n, v in config.get(k, {}).items() if v != "auto"} for k in ("fp16", "bf16")}
    return {**kept, **precision, "zero_optimization": zero, "gradient_clipping": clip}


def check_supported(config: dict[str, Any], zero: dict[str, Any]) -> None:
    """Raises ConfigError for parts of DeepSpeed that do not go together with this engine."""
    wrong = [name for name in UNSUPPORTED if config.get(name)]
    for name in ("offload_optimizer", "offload_param"):
        device = zero.get(name, {}).get("device", "none")
        if device not in ("none", "cpu"):
            wrong.append(f"zero_optimization.{name}.device {device}")
    if zero.get("stage") not in (1, 2, 3):
        wrong.append(f"zero_optimization.stage {zero.get('stage')}")
    if wrong:
        raise ConfigError(
            f"--deepspeed: {wrong[0]} is not supported",
            hint="stages 1 to 3, and the CPU for what is offloaded",
        )


def contradiction(name: str, value: object, flag: str) -> ConfigError:
    """The error for a value of the config that a flag says otherwise."""
    return ConfigError(f"--deepspeed: {name} {value} contradicts {flag}", hint=f'set {name} to "auto"')


@dataclass(frozen=True)
class ZeroWrapped:
    """As `wrap.Wrapped`. DeepSpeed averages gradients over all processes."""

    module: DeepSpeedEngine
    optimizer: Optimizer
    scale: float

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer, which holds slices."""
        return self.module.optimizer

    @property
    def stage(self) -> int:
        stage: int = self.module.zero_optimization_stage()
        return stage

    @contextmanager
    def gradients(self, *, is_last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss * self.scale)

    def step(self, limit: float) -> tuple[float, bool]:
        """Clips to the limit in its config, which is `limit`."""
        assert self.module.gradient_clipping() == limit, (self.module.gradient_clipping(), limit)
        self.module.step()
        return float(self.module.get_global_grad_norm()), self.module.was_step_applied()

    def shape(self, parameter: Tensor) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def gather(self, tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_shape"):  # which those have that it has sliced
            return tensor
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    @contextmanager
    def whole(self, model: nn.Module, run: Callable[[], object]) -> Iterator[None]:  # noqa: ARG002
        """As `wrap.Wrapped.whole`. Hooks that gather and release around each layer are off meanwhile."""
        if self.stage < 3:
            yield
            return
        parts = self.zero.parameter_offload
        parts.destroy()  # takes its hooks away, nothing else
        parts.forward_hooks.clear()
        parts.backward_hooks.clear()
        try:
            with deepspeed.zero.GatheredParameters(model.parameters()):
                yield
        finally:
            parts.setup_zero_stage3_hooks()

    def take_moments(self, model: nn.Module, ranks: Ranks) -> Moments:
        slices = self.optimizer.state[self._slices()[0]]
        names = [k for k, v in slices.items() if torch.is_tensor(v) and v.ndim]
        rest = {k: v for k, v in slices.items() if k not in names}
        parts: dict[str, Part] = {}
        plain: dict[str, dict[str, Any]] = {}

        def keep(name: str, whole: Tensor, turn: int) -> None:
            if turn % ranks.world == ranks.rank:
                parts[name] = Part(to_host(whole), tuple(whole.shape), (0,) * whole.ndim)

        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for turn, (name, parameter) in enumerate(trained):  # all ranks gather, one of them keeps
            for key in names:
                keep(f"{name}|{key}", safe_get_full_optimizer_state(parameter, key), turn)
            if parameter.dtype in HALF:
                keep(f"{name}|{MASTER}", safe_get_full_fp32_param(parameter), turn)
            for key, value in rest.items():
                if torch.is_tensor(value):
                    keep(f"{name}|{key}", value, turn)
                else:
                    plain.setdefault(name, {})[key] = value
        return Moments(parts, plain)

    def load_moments(self, model: nn.Module, reader: Reader, plain: dict[str, dict[str, Any]]) -> None:
        saved = {tuple(full_name.rsplit("|", 1)) for full_name in reader.shapes}
        names = {name for name, _ in saved}
        first = next(name for name, _ in model.named_parameters() if name in names)
        keys = [key for name, key in saved if name == first and key != MASTER]
        moments = [key for key in keys if reader.shapes[f"{first}|{key}"]]
        for part in self._slices():
            fresh = {key: reader.read(f"{first}|{key}") for key in keys if key not in moments}
            zeros = {key: torch.zeros_like(part) for key in moments}
            self.optimizer.state[part] = {**plain.get(first, {}), **fresh, **zeros}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in model.named_parameters():
            for key in moments if (name, moments[0]) in saved else ():
                safe_set_full_optimizer_state(parameter, reader.read(f"{name}|{key}"), key)
            if parameter.dtype in HALF and (name, MASTER) in saved:
                safe_set_full_fp32_param(parameter, reader.read(f"{name}|{MASTER}"))

    def _slices(self) -> list[Tensor]:
        """This rank's flat float32 slices, the keys of the optimizer's state."""
        found: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        return found

    def scaler_state(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self.zero.loss_scaler).items() if isinstance(v, int | float)}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if vars(self.zero.loss_scaler).keys() >= state.keys():  # else of a run without loss scaling
            vars(self.zero.loss_scaler).update(state)


def wrap_zero(
    model: nn.Module,
    base: PreTrainedModel,
    *,
    ranks: Ranks,
    compute: torch.dtype,
    build_optimizer: Callable[[], Optimizer],
    config: dict[str, Any],
) -> ZeroWrapped:
    """`model` under DeepSpeed. With half-precision weights it keeps float32 ones for the optimizer."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names it calls
    if not dist.is_initialized():  # it wants a group also of one process
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        env.set_defaults({"LOCAL_RANK": "0"})
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    # float32 adapters beside bfloat16 weights stay what they are: autocast runs both.
    keeps_float32 = base.dtype == torch.bfloat16 and trained == {torch.float32}
    settled = {
        **config,
        "train_micro_batch_size_per_gpu": 1,  # counts nothing here: batches and accumulation are ours
        "gradient_accumulation_steps": 1,
        "fp16": {**config["fp16"], "enabled": compute == torch.float16},
        "bf16": {**config["bf16"], "enabled": compute == torch.bfloat16 and not keeps_float32},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    optimizer = build_optimizer()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settled, dist_init_required=False
    )
    return ZeroWrapped(engine, optimizer, float(ranks.world))
