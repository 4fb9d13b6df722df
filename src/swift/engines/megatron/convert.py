"""Weights between formats, by processes that share one model in host memory; and what a model computes.

Functions are called by all ranks. Not here: directories and what else is in them (export/megatron.py).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn
from transformers import PretrainedConfig

from swift.batch import Batch
from swift.config.layout import Layout
from swift.engines.files import cut_into_files, write_index
from swift.engines.megatron.bridge import Bridge, Seen
from swift.engines.megatron.context import ContextRanks
from swift.engines.megatron.dist_checkpoint import load_model, save_model
from swift.engines.megatron.model import build_chunks
from swift.engines.megatron.schedule import Form, Taught, run_batches
from swift.engines.megatron.settings import Settings, model_settings
from swift.engines.megatron.setup import join_model_parallel, leave_model_parallel
from swift.engines.ranks import Ranks, join_ranks, leave_ranks
from swift.engines.slices import write_tensors

TIMEOUT_SECONDS = 7200  # that ranks wait for the slowest disk among them


@contextmanager
def sharing(layout: Layout, device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Processes that share a model; the device of this one."""
    ranks, device = join_ranks(device, TIMEOUT_SECONDS)
    ranks = join_model_parallel(ranks, layout, TIMEOUT_SECONDS)
    yield ranks, device
    leave_model_parallel()
    leave_ranks()


@dataclass(frozen=True)
class Model:
    """This rank's part of a model, in host memory."""

    hf: PretrainedConfig
    settings: Settings
    chunks: list[GPTModel]

    @property
    def bridge(self) -> Bridge:
        """Names and cuts of its parameters."""
        return Bridge(self.hf, self.settings)


def build_model(hf: PretrainedConfig, layout: Layout, dtype: torch.dtype) -> Model:
    """Without weights."""
    chosen: dict[str, Any] = {}
    if len(set(layout.layers)) > 1:
        ends = ("first", layout.layers[0]), ("last", layout.layers[-1])
        chosen = {f"num_layers_in_{end}_pipeline_stage": count for end, count in ends}
    fusions = ("bias_dropout_fusion", "bias_activation_fusion")  # which compile kernels for one forward pass
    settings = model_settings(
        hf, layout, dtype, use_cpu_initialization=True, **dict.fromkeys(fusions, False), **chosen
    )
    return Model(hf, settings, [chunk.eval() for chunk in build_chunks(hf, settings)])


def read_weights(model: Model, source: Path, *, is_hf: bool, seen: Seen) -> None:
    """From a directory in HF's layout, or that of an iteration of megatron-core."""
    if is_hf:
        model.bridge.load(model.chunks, source, seen)
    else:
        load_model(model.chunks, source)


def write_mcore(model: Model, directory: Path, seen: Seen) -> None:
    """directory/iter_0000001 and the file that names it."""
    save_model(model.chunks, directory, seen)


def write_hf(model: Model, directory: Path, *, ranks: Ranks, shard_bytes: int, seen: Seen) -> None:
    """model*.safetensors and their index; every rank writes files, and holds one of them at a time."""
    sizes = {name: whole.nbytes for name, whole in model.bridge.wholes(model.chunks).items()}
    files = cut_into_files(sizes, shard_bytes)
    keeper = {key: i % ranks.world for i, keys in enumerate(files.values()) for key in keys}
    ends = {keys[-1]: name for name, keys in files.items()}
    held: dict[str, Tensor] = {}
    for key, tensor in model.bridge.export(model.chunks, writer=keeper.__getitem__):
        if tensor is not None:
            held[key] = tensor
        if key in ends and held:
            write_tensors(directory / ends[key], held, {"format": "pt"})
            held = {}
        seen(sizes[key])
    if ranks.is_main:
        write_index(directory, files, sum(sizes.values()))


def round_to(model: Model, dtype: torch.dtype) -> None:
    """Gives weights the values that they have in `dtype`, without changing their own."""
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def sum_up(tensors: Iterable[Tensor | None]) -> tuple[int, float, int]:
    """How many numbers there are, their sum, and how many are zero."""
    count, total, zeros = 0, 0.0, 0
    for tensor in tensors:
        if tensor is not None:
            count += tensor.numel()
            total += float(tensor.sum(dtype=torch.float64))
            zeros += int((tensor == 0).sum())
    return count, total, zeros


def run_by_parts(model: nn.Module, device: torch.device) -> None:
    """From now on each module's own weights are on `device` while it runs, and in host memory otherwise."""
    if device.type == "cpu":
        return

    homes: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def enter(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        homes[module] = [(tensor, tensor.data) for tensor in own(module)]
        for tensor, data in homes[module]:
            tensor.data = data.to(device)
        # A tied head is handed the embedding's weight, which is at home by then.
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x  # noqa: E731
        return tuple(map(move, inputs)), {name: move(value) for name, value in named.items()}

    def leave(module: nn.Module, *_: Any) -> None:
        for tensor, data in homes.pop(module):
            tensor.data = data

    for module in model.modules():
        if own(module):
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)


def own(module: nn.Module) -> list[Tensor]:
    """Weights and buffers that are not those of modules in it."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@torch.no_grad()
def compute_logits(model: Model, ids: Tensor, *, ranks: Ranks, device: torch.device) -> Tensor | None:
    """ids [T] of one row -> [T, V] float32 on the CPU, on rank 0; None on the others."""
    for chunk in model.chunks:
        run_by_parts(chunk, device)
    settings, vocabulary = model.settings, model.hf.vocab_size
    form = Form(settings, vocabulary, device, ContextRanks())
    row = Batch(ids, ids, torch.zeros_like(ids), 1)

    def finish(logits: Tensor, non_loss_data: bool = False) -> Tensor:  # noqa: ARG001 - megatron's argument
        whole = gather_from_tensor_model_parallel_region(logits)
        return whole[0, : len(ids), :vocabulary].float().cpu()

    def step(rows: Iterator[Taught], chunk: nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
        laid = form.lay_out(next(rows)[0])
        return chunk(laid.ids_t[None], None, None, packed_seq_params=laid.flat), finish

    # Stages with several chunks take rows in rounds of as many as there are stages.
    count = settings.pipeline_model_parallel_size if len(model.chunks) > 1 else 1
    found = run_batches(model.chunks, [(row, None)] * count, step, train=False)
    everyones = ranks.collect(found[0] if found and ranks.rank == ranks.speakers[0] else None)
    return next(logits for logits in everyones if logits is not None) if ranks.is_main else None
