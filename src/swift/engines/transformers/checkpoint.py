"""Files of an engine: weights in HF format, and the state that makes a run resumable.

Nothing depends on how many processes there are, but for random states, which are those of each process.
A snapshot is a copy on the host; it is written later, while training goes on, straight into the directory
given. train/saving.py makes the whole checkpoint atomic.
"""

import copy
import math
from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from swift.engines.files import (
    SCHEDULER,
    SHARD_BYTES,
    WEIGHTS,
    Writer,
    adapter_writer,
    cut_into_files,
    keep_bytes,
    load_random,
    random_file,
    random_states,
    write_index,
)
from swift.engines.optim import answering, progress_of
from swift.engines.protocol import Snapshot
from swift.engines.ranks import Ranks
from swift.engines.slices import Reader, settle, to_host, write_parts, write_tensors
from swift.engines.transformers.wrap import Wrapped
from swift.models.starts import has_starts, load_starts, with_starts

REFERENCE = "reference"

Model = PreTrainedModel | PeftModel


def take_snapshot(
    model: Model,
    wrapped: Wrapped,
    scheduler: LRScheduler,
    path: Path,
    *,
    ranks: Ranks,
    resumable: bool,
    reference: PreTrainedModel | None = None,
) -> Snapshot:
    """A copy of what this process will write into `path`. Called by all ranks; gathers tensor by tensor.

    `reference`: one that training changes, which goes into a directory of its own.
    """
    with answering(wrapped.optimizer):
        take = take_adapter if isinstance(model, PeftModel) else take_weights
        size, weights = take(model, wrapped, ranks)
        groups = progress_of(wrapped.optimizer)
    writers = [weights]
    if resumable:
        moments = wrapped.take_moments(model, ranks)
        size += sum(part.tensor.nbytes for part in moments.parts.values())
        rest = {
            "schedule": scheduler.state_dict(),
            "groups": groups,
            "plain": moments.plain,
            "scaler": wrapped.scaler_state(),
        }
        name = f"optimizer-{ranks.rank + 1:05d}-of-{ranks.world:05d}.safetensors"
        writers.append(lambda into: [write_parts(into / name, moments.parts)])
        writers.append(keep_bytes(random_file(ranks.rank), random_states()))
        writers += [keep_bytes(SCHEDULER, rest)] if ranks.is_main else []
        if reference is not None:
            more, write_reference = take_weights(reference, wrapped, ranks)
            size += more
            writers.append(lambda into: write_reference(into / REFERENCE))
    settle()
    return Snapshot(size, lambda: [file for writer in writers for file in writer(path)])


def take_adapter(model: PeftModel, wrapped: Wrapped, ranks: Ranks) -> tuple[int, Writer]:
    """Bytes and writer of adapter_model.safetensors, on rank 0. The frozen model is not even gathered."""
    state = model.state_dict(keep_vars=True)
    kept = {id(t) for t in get_peft_model_state_dict(model, state_dict=dict(state)).values()}
    copies: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) in kept:
            whole = wrapped.gather(tensor)
            copies |= {name: to_host(whole)} if ranks.is_main else {}

    if not ranks.is_main:
        return 0, lambda _: []
    # All of it now: PEFT asks modules for their state, which FSDP2 answers by slicing them again. Done beside
    # training, that would take the weights away from under a forward pass.
    config = copy.deepcopy(model.peft_config["default"])
    if has_starts(model):
        copies, config = with_starts(model, copies, config)
    settle()
    tensors = get_peft_model_state_dict(model, state_dict=copies)
    return sum(t.nbytes for t in copies.values()), adapter_writer(config, tensors)


def take_weights(model: PreTrainedModel, wrapped: Wrapped, ranks: Ranks) -> tuple[int, Writer]:
    """Bytes and writer of this rank's model*.safetensors; rank 0 adds config.json and the index.

    transformers' own writer is asked for everything but the tensors: it needs all of them in one process.
    """
    state = unique_weights(model)
    sizes = {k: math.prod(wrapped.shape(t)) * t.element_size() for k, t in state.items()}
    files = cut_into_files(sizes, SHARD_BYTES)
    mine: dict[str, dict[str, Tensor]] = {}
    for i, (name, keys) in enumerate(files.items()):
        wholes = ((key, wrapped.gather(state[key])) for key in keys)  # on all ranks, whoever keeps it
        copies = {key: to_host(whole) for key, whole in wholes if i % ranks.world == ranks.rank}
        if i % ranks.world == ranks.rank:
            mine[name] = copies
    hollow = {k: torch.empty(wrapped.shape(t), dtype=t.dtype, device="meta") for k, t in state.items()}

    def write(into: Path) -> list[Path]:
        into.mkdir(exist_ok=True)
        if ranks.is_main:
            model.save_pretrained(into, state_dict={})
            (into / WEIGHTS).unlink(missing_ok=True)  # that of no tensors
            written = {
                name: revert_weight_conversion(model, {key: hollow[key] for key in keys})
                for name, keys in files.items()
            }
            write_index(into, written, sum(t.nbytes for s in written.values() for t in s.values()))
        return [
            write_tensors(into / name, revert_weight_conversion(model, copies), {"format": "pt"})
            for name, copies in mine.items()
        ]

    return sum(t.nbytes for copies in mine.values() for t in copies.values()), write


def unique_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight and saved buffer by name; of tied ones the name that transformers expects to find."""
    tied, ignored = model._tied_weights_keys or {}, set(model._keys_to_ignore_on_save or ())
    state = model.state_dict(keep_vars=True)
    unique: dict[int, str] = {}
    for name in sorted(state, key=lambda n: any(n.endswith(key) for key in tied)):
        unique.setdefault(id(state[name]), name)
    names = set(unique.values()) - ignored
    return {name: tensor for name, tensor in state.items() if name in names}


def load_weights(model: Model, path: Path) -> None:
    """Puts the saved weights into a model of the same shape; no tensor may be missing or left over."""
    if isinstance(model, PeftModel):
        tensors = load_peft_weights(str(path), device="cpu")
        saved_rank = PeftConfig.from_pretrained(str(path)).r
        if saved_rank == 2 * model.peft_config["default"].r:
            tensors = load_starts(model, tensors)
        result = set_peft_model_state_dict(model, tensors)
        assert not result.unexpected_keys, f"{path}: unexpected adapter tensors {result.unexpected_keys[:3]}"
        return
    saved = type(model).from_pretrained(path, dtype=model.dtype, local_files_only=True)
    model.load_state_dict(saved.state_dict())


def load_state(
    model: nn.Module, wrapped: Wrapped, scheduler: LRScheduler, path: Path, *, ranks: Ranks
) -> None:
    """The inverse of a resumable snapshot, into any number of processes. Called by all ranks."""
    rest = torch.load(path / SCHEDULER, map_location="cpu", weights_only=True)
    wrapped.load_moments(model, Reader(path.glob("optimizer-*.safetensors")), rest["plain"])
    wrapped.load_scaler_state(rest["scaler"])
    for group, progress in zip(wrapped.optimizer.param_groups, rest["groups"], strict=True):
        group.update(progress)
    scheduler.load_state_dict(rest["schedule"])
    load_random(path, ranks.rank)
