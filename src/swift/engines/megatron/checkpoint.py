"""Checkpoints of a training: megatron-core's own files for going on, HuggingFace's for everything else.

    checkpoint-100/iter_0000100/            weights and optimizer, for any layout of ranks
    checkpoint-100/latest_checkpointed_iteration.txt
    checkpoint-100/model*.safetensors, config.json; of adapters adapter_model.safetensors, adapter_config.json
    checkpoint-100/scheduler.pt, rng_state*.pth

Not here: the formats themselves (dist_checkpoint.py, bridge.py).
"""

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from swift.engines.files import (
    SCHEDULER,
    SHARD_BYTES,
    Writer,
    adapter_writer,
    cut_into_files,
    keep_bytes,
    load_random,
    random_file,
    random_states,
    write_index,
)
from swift.engines.megatron import dist_checkpoint
from swift.engines.megatron.bridge import Bridge
from swift.engines.megatron.lora import AdapterBridge, adapter_state, put_adapters
from swift.engines.protocol import Snapshot
from swift.engines.slices import write_tensors
from swift.models.mcore import TRACKER
from swift.utils.files import write_json, write_text

if TYPE_CHECKING:
    from swift.engines.megatron.engine import MegatronEngine

# Optimizer states as whole tensors: they can be cut for any layout.
RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Files:
    """What is written beside megatron-core's own files, and where the rest of a HuggingFace directory is."""

    config: PretrainedConfig
    source: Path
    hugging_face: bool = True
    adapter: LoraConfig | None = None  # where adapters alone are trained


def iteration(step: int) -> str:
    """The directory of megatron-core's files."""
    return f"iter_{step:07d}"


def sharded_state(engine: "MegatronEngine", *, optimizer: bool, is_loading: bool) -> dict[str, Any]:
    """Weights that are trained, and with `optimizer` its state, as megatron-core describes them."""
    describe = adapter_state if engine.files.adapter else dist_checkpoint.model_state
    state = describe(engine.chunks)
    if optimizer:
        weights = describe(engine.chunks)  # the optimizer takes its description apart
        whole = weights["model"] if len(weights) == 1 else weights
        ready = first_step_taken(engine.optimizer) if is_loading else nullcontext()
        with ready:
            state["optimizer"] = engine.optimizer.sharded_state_dict(
                whole, is_loading=is_loading, metadata=RESHARDABLE
            )
    return state


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of which one consists: experts may have their own."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def put_moments(part: Any, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
    """In place of megatron-core's own (0.16), which asks the files for the step that torch's AdamW counts."""
    group, place = part.model_param_group_index_map[parameter]
    weights = part.optimizer.param_groups[group]["params"][place]
    for name, value in values.items():
        (weights if name == "param" else part.optimizer.state[weights][name]).copy_(value)


def put_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """What was read of the optimizer, into it."""
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW):
            part._set_main_param_and_optimizer_states = partial(put_moments, part)
    optimizer.load_state_dict(state)
    for part in parts_of(optimizer):  # which share one tensor now, and would count it up together
        for moments in part.optimizer.state.values():
            moments["step"] = torch.as_tensor(moments["step"]).clone()


@contextmanager
def first_step_taken(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside it AdamW has the moments that its first step makes; megatron-core describes them to read others.

    It makes them anew when it takes what was read.
    """
    inner = [part.optimizer for part in parts_of(optimizer)]
    for part in inner:
        for parameter in (p for group in part.param_groups for p in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            part.state[parameter] = {"step": torch.tensor(0.0), **moments}
    yield
    for part in inner:
        part.state.clear()


def take_snapshot(engine: "MegatronEngine", path: Path, *, resumable: bool) -> Snapshot:
    """A copy of what this rank will write into `path`. Called by all ranks."""
    ranks, step = engine.ranks, engine.step
    into = path / iteration(step)
    state = sharded_state(engine, optimizer=resumable, is_loading=False)
    writing = dist_checkpoint.prepare(state | {"checkpoint_version": 3.0, "iteration": step})
    if ranks.is_main:
        into.mkdir()
    ranks.collect(None)
    size, writers = writing.bytes, [lambda _: writing.write(into)]
    if engine.files.hugging_face:
        more, writer = take_weights(engine) if engine.files.adapter is None else take_adapters(engine)
        size, writers = size + more, [*writers, writer]
    if resumable:
        states = random_states() | {"tracker": get_cuda_rng_tracker().get_states()}
        writers.append(keep_bytes(random_file(ranks.rank), states))
        rest = {"schedule": engine.scheduler.state_dict(), "step": step}
        writers += [keep_bytes(SCHEDULER, rest)] if ranks.is_main else []

    def finish() -> None:
        writing.finish(into)
        write_text(path / TRACKER, str(step))

    return Snapshot(size, lambda: [file for writer in writers for file in writer(path)], finish)


def take_adapters(engine: "MegatronEngine") -> tuple[int, Writer]:
    """Bytes and writer of rank 0's adapter_model.safetensors and adapter_config.json."""
    tensors = AdapterBridge().tensors(engine.plain)
    if not engine.ranks.is_main:
        return 0, lambda _: []
    assert engine.files.adapter is not None
    write = adapter_writer(copy.deepcopy(engine.files.adapter), tensors)
    return sum(tensor.nbytes for tensor in tensors.values()), write


def take_weights(engine: "MegatronEngine") -> tuple[int, Writer]:
    """Bytes and writer of this rank's model*.safetensors; rank 0 adds what is around them."""
    bridge, ranks = Bridge(engine.files.config, engine.settings), engine.ranks
    sizes = {name: whole.nbytes for name, whole in bridge.wholes(engine.plain).items()}
    files = cut_into_files(sizes, SHARD_BYTES)
    keeper = {key: i % ranks.world for i, keys in enumerate(files.values()) for key in keys}
    held = {
        key: tensor
        for key, tensor in bridge.export(engine.plain, writer=keeper.__getitem__)
        if tensor is not None
    }

    def write(into: Path) -> list[Path]:
        if ranks.is_main:
            write_configs(into, engine.files, engine.dtype)
            write_index(into, files, sum(sizes.values()))
        return [
            write_tensors(into / name, {key: held[key] for key in keys}, {"format": "pt"})
            for name, keys in files.items()
            if keeper[keys[0]] == ranks.rank
        ]

    return sum(tensor.nbytes for tensor in held.values()), write


def write_configs(into: Path, files: Files, dtype: torch.dtype) -> None:
    """config.json and generation_config.json."""
    config = files.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("quantization_config", None)  # whose weights have become plain ones
    write_json(into / "config.json", config)
    generation = files.source / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, into / generation.name)


def load_checkpoint(engine: "MegatronEngine", path: Path, *, optimizer: bool, random: bool) -> None:
    """The inverse of a resumable snapshot, into any layout. Called by all ranks."""
    rest: dict[str, Any] = torch.load(path / SCHEDULER, map_location="cpu", weights_only=True)
    engine.step = rest["step"]
    engine.scheduler.load_state_dict(rest["schedule"])
    state = sharded_state(engine, optimizer=optimizer, is_loading=True)
    read = dist_checkpoint.read(path / iteration(engine.step), state)
    put = put_adapters if engine.files.adapter else dist_checkpoint.put
    put(engine.chunks, read)
    if optimizer:
        put_optimizer(engine.optimizer, read["optimizer"])
    else:
        engine.optimizer.reload_model_params()
    if random:
        states = load_random(path, engine.ranks.rank)
        if states:  # also those that differ between tensor-parallel ranks
            get_cuda_rng_tracker().set_states(states["tracker"])
