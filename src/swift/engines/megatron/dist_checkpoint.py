"""megatron-core's own checkpoints, `torch_dist`: written under one layout of ranks, read under any other.

Owns: files of an iteration, as megatron-core itself writes them, and what is wrong with those that cannot be
read. megatron-core's own writer starts helper processes, which import the program anew; here a rank writes
its file by itself, and may do so beside training: all exchanges between ranks come before.
Not here: what is in the states (engine), HF's files (bridge.py), which directory (models/mcore.py).
"""

import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from swift.config.option import ConfigError
from swift.engines.megatron.bridge import Seen, collect, unwrap
from swift.engines.megatron.layers import Head
from swift.engines.megatron.tables import HEAD
from swift.engines.slices import settle, to_host
from swift.models.mcore import METADATA, TRACKER
from swift.utils.files import write_text

COMMON, KIND = "common.pt", CheckpointingConfig("torch_dist", 1)
COMMON_KEY = re.compile("common_state/")  # where later versions of megatron-core keep it
OUTPUT = "output_layer.weight"
OPTIMIZER = "optimizer."  # how keys of its states begin
AGAIN = "convert or copy it again"


@dataclass(frozen=True)
class Writing:
    """What one rank has to write, and what rank 0 adds when all have written."""

    plan: SavePlan
    planner: SavePlanner
    metadata: Metadata
    common: Mapping[str, Any]  # what is the same on all ranks
    rank: int
    world: int
    bytes: int  # of this rank's tensors

    def write(self, directory: Path) -> list[Path]:
        """This rank's file, into a directory that exists. Exchanges nothing."""
        results = FileSystemWriter(directory).write_data(self.plan, self.planner).wait()
        (directory / placed(self.rank)).write_bytes(pickle.dumps(results))
        return sorted({directory / result.storage_data.relative_path for result in results})

    def finish(self, directory: Path) -> None:
        """On one rank, when all have written: where everything is. Files without it are not whole."""
        results = []
        for rank in range(self.world):
            # Of this very save, by a process of this job.
            results.append(pickle.loads((directory / placed(rank)).read_bytes()))
            (directory / placed(rank)).unlink()
        torch.save(dict(self.common), directory / COMMON)
        save_config(KIND, str(directory))
        FileSystemWriter(directory).finish(self.metadata, results)


class Telling(MCoreSavePlanner):
    """Tells of the bytes that it hands out to be written."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(flatten_state_dict=False)
        self.seen = seen

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The value to write, which is written next."""
        found = super().resolve_data(write_item)
        self.seen(found.nbytes if isinstance(found, Tensor) else 0)
        return found


def placed(rank: int) -> str:
    """File in which a rank notes where in its file it has put what."""
    return f".placed-{rank}"


def prepare(state: dict[str, Any], *, copy: bool = True, seen: Seen = lambda _: None) -> Writing:
    """Settles who writes what of a sharded state. Called by all ranks; `state` is used up.

    copy: into host memory, so that tensors may change before they are written. `seen` hears of written bytes.
    """
    sharded, common = save_preprocess(state)
    mine = [
        s for s in nested_values(sharded) if isinstance(s, ShardedTensor) and is_main_replica(s.replica_id)
    ]
    if copy:
        for tensor in mine:
            tensor.data = to_host(tensor.data)
        settle()
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = Telling(seen)
    rank, world = dist.get_rank(), dist.get_world_size()
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=rank == 0)
    plans, metadata = planner.create_global_plan(collect(planner.create_local_plan()))
    plan = FileSystemWriter("").prepare_global_plan(plans)[rank]
    size = sum(tensor.data.nbytes for tensor in mine)
    return Writing(planner.finish_plan(plan), planner, metadata, common, rank, world, size)


def write(directory: Path, state: dict[str, Any], seen: Seen = lambda _: None) -> None:
    """Writes a sharded state at once. Called by all ranks."""
    writing = prepare(state, copy=False, seen=seen)
    if writing.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    collect(None)
    writing.write(directory)
    collect(None)
    if writing.rank == 0:
        writing.finish(directory)
    collect(None)


def read(directory: Path, state: dict[str, Any], beside: Collection[str] = ()) -> dict[str, Any]:
    """The state of `directory` under this layout, with what was the same on all ranks. Called by all ranks.

    `state` says what to read; files may hold `beside` too. Raises ConfigError where files are missing or cut
    off, or are of another model.
    """
    metadata = read_metadata(directory)
    objects = set(metadata.state_dict_metadata)
    kept = {name: without_missing(part, objects) for name, part in state.items()}
    faults = [fault for fault in collect(find_fault(kept.values(), metadata, directory, beside)) if fault]
    if faults:  # all ranks end with the first that any of them has found
        raise ConfigError(faults[0])
    return dist_checkpointing.load(kept, str(directory))


def without_missing(part: Any, present: set[str]) -> Any:
    """A state without what modules keep beside weights, such as scales of 8-bit values, and files lack."""
    if not isinstance(part, dict):
        return part
    return {
        name: value
        for name, value in part.items()
        if not isinstance(value, ShardedObject) or value.unique_key in present
    }


def read_metadata(directory: Path) -> Metadata:
    """What a checkpoint holds and where; checks that the files reach as far."""
    for name in (METADATA, "metadata.json"):
        if not (directory / name).is_file():
            raise ConfigError(f"{directory} has no {name}: it was not written to the end", hint=AGAIN)
    try:
        metadata = FileSystemReader(directory).read_metadata()
    except (EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise ConfigError(f"{directory / METADATA} is damaged: {error}", hint=AGAIN) from error
    if not (directory / COMMON).is_file() and not any(map(COMMON_KEY.match, metadata.state_dict_metadata)):
        raise ConfigError(f"{directory} has no {COMMON}: it was not written to the end", hint=AGAIN)
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        size = (directory / name).stat().st_size if (directory / name).is_file() else None
        if size is None or size < end:
            what = "is missing" if size is None else f"has {size:,} bytes instead of {end:,}"
            raise ConfigError(f"{directory / name} {what}", hint=AGAIN)
    return metadata


def find_fault(
    parts: Iterable[Any], metadata: Metadata, directory: Path, beside: Collection[str]
) -> str | None:
    """Why this rank cannot have its weights, or what files hold beyond all ranks' own; None = all fits."""
    wanted = {tensor.key: tensor for part in parts for tensor in tensors_of(part)}
    everyones = set().union(*collect(set(wanted)))
    about = metadata.state_dict_metadata
    held = {key: tuple(entry.size) for key, entry in about.items() if hasattr(entry, "size")}
    for key, tensor in wanted.items():
        shape = tuple(tensor.global_shape)
        found = held.get(key)
        if found is None:
            return f"{directory} lacks {key}: it is of another model"
        if found[1:] != shape[1:] or (found != shape and not tensor.allow_shape_mismatch):
            return f"{directory} does not fit the model: {key} is {list(found)}, not {list(shape)}"
    left = sorted(key for key in held.keys() - everyones - set(beside) if not key.startswith(OPTIMIZER))
    return f"{directory} is of another model: it holds {left[0]}" if left else None


def tensors_of(part: Any) -> list[ShardedTensor]:
    """Every sharded tensor of a state, those that are made of others included."""
    found = []
    for value in nested_values(part) if isinstance(part, dict) else ():
        if isinstance(value, ShardedTensorFactory):
            found += nested_values(value.build())
        elif isinstance(value, ShardedTensor):
            found.append(value)
    return found


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """The weights of this rank as sharded states, named as megatron-core's own trainer names them."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    states = {n: unwrap(chunk).sharded_state_dict() for n, chunk in zip(names, chunks, strict=True)}
    for state, chunk in zip(states.values(), map(unwrap, chunks), strict=True):
        if chunk.post_process and isinstance(chunk.output_layer, Head):  # no rows of a padded vocabulary
            state[OUTPUT].key, state[OUTPUT].allow_shape_mismatch = HEAD, False
    return states


def put(chunks: Sequence[nn.Module], state: Mapping[str, Any], may_lack: tuple[str, ...] = ()) -> None:
    """What `read` gave for `model_state` into the chunks; what it lacks of `may_lack` stays as it is."""
    for chunk, part in zip(chunks, (state[name] for name in model_state(chunks)), strict=True):
        model = unwrap(chunk)
        absent, _ = model.load_state_dict(part, strict=False)
        assert not [name for name in absent if not name.endswith(("_extra_state", *may_lack))], absent


def save_model(chunks: Sequence[nn.Module], directory: Path, seen: Seen = lambda _: None) -> None:
    """Writes weights as directory/iter_0000001, and the file that names it. Called by all ranks."""
    write(directory / "iter_0000001", model_state(chunks) | {"checkpoint_version": 3.0, "iteration": 1}, seen)
    if dist.get_rank() == 0:
        write_text(directory / TRACKER, "1")


def load_model(chunks: Sequence[nn.Module], weights: Path, *, new_head: bool = False) -> None:
    """Reads weights from an iteration's directory, written under any layout. Called by all ranks.

    new_head: of a model with a head everything else, from a language model.
    """
    state, spare = model_state(chunks), (OUTPUT,) if new_head else ()
    for part in state.values():
        for name in spare:
            part.pop(name, None)
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            value.merge_fn = in_place(value)
    put(chunks, read(weights, state, spare), spare)


def in_place(factory: ShardedTensorFactory) -> Callable[[list[Tensor]], Tensor]:
    """Puts a parameter together of its parts, without a copy where they are in it already."""
    whole, merge = factory.data, factory.merge_fn

    def join(parts: list[Tensor]) -> Tensor:
        same = all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
        return whole if same else merge(parts)

    return join
