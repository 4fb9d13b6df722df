"""Weights between the files of published models and the parameters of megatron-core, in both directions.

Files are read slice by slice, and only the slices that a rank holds; whole tensors exist one at a time.
Not here: names (tables.py), cuts (pieces.py), megatron-core's own files (dist_checkpoint.py).
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from swift.config.option import ConfigError
from swift.engines.files import INDEX
from swift.engines.megatron.pieces import KINDS, Box, Cut, Piece, Shape
from swift.engines.megatron.settings import Settings
from swift.engines.megatron.tables import rows_of
from swift.models.directory import check_model_directory, read_json, weight_files
from swift.utils.log import warn_once

IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"(?<=\.experts\.linear_fc[12]\.weight)\d+$")
# Constants that old checkpoints hold and models work out by themselves.
CONSTANT = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias)$")
BIAS = ".router.expert_bias"  # the one buffer that files hold
SCALE = "_scale_inv"  # of blocks of 8-bit floats, after the name of the weight
LAYER = re.compile(r"model\.layers\.(\d+)\.")

Value = Callable[[Tensor], Tensor]
Seen = Callable[[int], object]


@dataclass(frozen=True)
class Part:
    """A parameter of this rank, and the named tensors in files that it is made of."""

    parameter: Tensor
    pieces: list[tuple[str, Piece]]


@dataclass
class Whole:
    """A tensor in files: its shape, its dtype, and the ranks that hold each of its parts."""

    shape: Shape
    dtype: torch.dtype
    holders: dict[Box, list[int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Bridge:
    """Loads and exports the chunks of one model. `settings` are those that the chunks were built with."""

    def __init__(self, hf_config: PretrainedConfig, settings: Settings) -> None:
        self.spare = {"lm_head.weight"} if hf_config.tie_word_embeddings or settings.head else set()
        self.rows = rows_of(hf_config, head=bool(settings.head))
        self.vocabulary, self.settings = hf_config.vocab_size, settings
        self.block = block_of(hf_config)
        # Layers that predict tokens further on follow the model's own.
        count = getattr(hf_config, "num_nextn_predict_layers", None) or 0
        self.further = range(settings.num_layers, settings.num_layers + count)

    def load(
        self,
        chunks: Sequence[nn.Module],
        source: Path,
        seen: Seen = lambda _: None,
        may_lack: Collection[str] = (),
    ) -> None:
        """Fills the parameters of this rank from a directory in HF's layout. Called by all ranks.

        Raises ConfigError, before anything is changed, where tensors are missing, left over or misshaped.
        `seen` is told of bytes that have been read. Of `may_lack` what files lack stays as it is.
        """
        parts = self.parts(chunks)
        own = {name: piece.whole for part in parts for name, piece in part.pieces}
        shapes = {name: shape for theirs in collect(own) for name, shape in theirs.items()}
        with ExitStack() as stack:
            files = open_weights(source, stack)
            shapes = {name: shape for name, shape in shapes.items() if name in files or name not in may_lack}
            self._check(files, shapes, source)
            for part in parts:
                if all(name in files for name, _ in part.pieces):
                    fill(part, files, self.block)
                seen(part.parameter.nbytes)

    def _check(self, files: Mapping[str, Any], shapes: Mapping[str, Shape], source: Path) -> None:
        missing = sorted(shapes.keys() - files.keys())
        if missing:
            raise ConfigError(
                f"the weights in {source} lack {len(missing)} tensors, the first is {missing[0]}"
            )
        scales = {name + SCALE for name in shapes} if self.block else set()
        known = shapes.keys() | self.spare | scales
        left = sorted(name for name in files.keys() - known if not CONSTANT.search(name))
        further = {name for name in left if (at := LAYER.match(name)) and int(at[1]) in self.further}
        if further:
            warn_once(
                f"{len(further)} tensors of layers that predict further tokens (MTP, model.layers."
                f"{self.further[0]}) are left out: they are neither trained nor saved"
            )
        left = [name for name in left if name not in further]
        if left:
            raise ConfigError(
                f"the weights in {source} hold {len(left)} tensors that config.json has no place for, "
                f"the first is {left[0]}"
            )
        for name, shape in shapes.items():
            found = files[name].get_slice(name).get_shape()
            if tuple(found) != shape:
                raise ConfigError(
                    f"the weights in {source} do not fit its config.json: {name} is {found}, "
                    f"not {list(shape)}"
                )

    def export(
        self,
        chunks: Sequence[nn.Module],
        value: Value = lambda parameter: parameter,
        writer: Callable[[str], int] = lambda _: 0,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """(name, whole tensor on the CPU) as files have them, tensor by tensor, in one order on all ranks.

        All ranks go through all of it. A tensor is there on the rank that `writer` gives for its name, None
        on the others. `value` is what is exported of a parameter: a view of it, or a tensor like it such as
        its gradient; it is asked several times.
        """
        mine: dict[str, dict[Box, tuple[Tensor, Box]]] = defaultdict(dict)
        for part in self.parts(chunks):
            for name, piece in part.pieces:
                mine[name][piece.source] = part.parameter, piece.target
        device = next(chunks[0].parameters()).device
        if device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=device))  # NCCL wants all ranks in its first exchange
        for name, whole in self.wholes(chunks, value).items():
            yield name, exchange(whole, mine[name], value, to=writer(name), device=device)

    def wholes(
        self, chunks: Sequence[nn.Module], value: Value = lambda parameter: parameter
    ) -> dict[str, Whole]:
        """Every tensor that `export` gives, in its order. Called by all ranks."""
        own: dict[str, Whole] = {}
        for part in self.parts(chunks):
            dtype = value(part.parameter).dtype
            for name, piece in part.pieces:
                own.setdefault(name, Whole(piece.whole, dtype)).holders[piece.source] = []
        wholes: dict[str, Whole] = {}
        for rank, theirs in enumerate(collect(own)):
            for name, their in theirs.items():
                whole = wholes.setdefault(name, Whole(their.shape, their.dtype))
                for box in their.holders:
                    whole.holders.setdefault(box, []).append(rank)
        for name, whole in wholes.items():
            held = sum(map(size, whole.holders))
            assert held == math.prod(whole.shape), f"{name}: ranks hold {held} numbers of {whole.shape}"
        return dict(sorted(wholes.items(), key=lambda item: in_order(item[0])))

    def parts(self, chunks: Sequence[nn.Module]) -> list[Part]:
        """Every parameter of this rank but those of adapters, and what else files hold of its layers."""
        return [
            Part(tensor, self._pieces(model, name, tuple(tensor.shape)))
            for model in map(unwrap, chunks)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if ".lora." not in name and (isinstance(tensor, nn.Parameter) or name.endswith(BIAS))
        ]

    def _pieces(self, model: GPTModel, name: str, shape: Shape) -> list[tuple[str, Piece]]:
        inside = IN_LAYER.match(name)
        layer = model.decoder.layers[int(inside[1])].layer_number - 1 if inside else 0
        short = name[inside.end() :] if inside else name
        row = self.rows[EXPERT.sub("*", short)]
        if ".experts." not in short:
            pieces = KINDS[row.kind](shape, self._cut(expert=False))
            return [(row.files[piece.file].format(layer), piece) for piece in pieces]
        assert self.settings.num_moe_experts is not None
        count = self.settings.num_moe_experts // self.settings.expert_model_parallel_size
        local = parallel_state.get_expert_model_parallel_rank() * count
        number = EXPERT.search(short)
        found = []
        for i in [int(number[0])] if number else range(shape[0]):
            for piece in KINDS[row.kind](shape if number else shape[1:], self._cut(expert=True)):
                place = piece if number else replace(piece, target=((i, i + 1), *piece.target))
                found.append((row.files[piece.file].format(layer).replace("*", str(local + i)), place))
        return found

    def _cut(self, *, expert: bool) -> Cut:
        kind = "expert_tensor" if expert else "tensor_model"
        assert self.settings.num_query_groups is not None
        return Cut(
            rank=getattr(parallel_state, f"get_{kind}_parallel_rank")(),
            ranks=getattr(parallel_state, f"get_{kind}_parallel_world_size")(),
            vocabulary=self.vocabulary,
            heads=self.settings.num_attention_heads,
            groups=self.settings.num_query_groups,
        )


def unwrap(chunk: nn.Module) -> GPTModel:
    """The model inside whatever was put around it for training."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def collect(value: Any) -> list[Any]:
    """`value` of every rank."""
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def size(box: Box) -> int:
    """How many numbers it holds."""
    return math.prod(end - start for start, end in box)


def slices(box: Box) -> tuple[slice, ...]:
    """The same, to index a tensor with."""
    return tuple(slice(start, end) for start, end in box)


def in_order(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layers and experts by number; what comes after all layers comes last."""
    after = not name.startswith(("model.embed_tokens.", "model.layers."))
    parts = [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]
    return [(after, 0, ""), *parts]


def open_weights(source: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor in the safetensors files of a model, by name, with the open file that holds it."""
    check_model_directory(source)
    index = source / INDEX
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else None
    paths = [source / name for name in names] if names else weight_files(source)
    found: dict[str, Any] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise ConfigError(
                f"{path} is no safetensors file", hint="megatron reads weights from safetensors"
            )
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} cannot be read: {error}", hint="copy it anew from its source"
            ) from error
        found |= dict.fromkeys(file.keys(), file)
    return found


def block_of(hf: PretrainedConfig) -> tuple[int, int] | None:
    """Rows and columns of weights that have a scale together; None = files hold plain weights."""
    told = getattr(hf, "quantization_config", None)
    if told is None:
        return None
    if told.get("quant_method") != "fp8" or not told.get("weight_block_size"):
        raise ConfigError(
            f"megatron does not read weights quantised by {told.get('quant_method')}",
            hint="it reads plain ones, and 8-bit floats in blocks (fp8 as DeepSeek-V3 has it)",
        )
    rows, columns = told["weight_block_size"]
    return rows, columns


def read_box(files: Mapping[str, Any], name: str, box: Box, block: tuple[int, int] | None) -> Tensor:
    """A rectangle of a tensor in files; where it has scales, of 8-bit floats, each `block` times its own."""
    values: Tensor = files[name].get_slice(name)[slices(box)]
    if block is None or name + SCALE not in files:
        return values
    around = tuple((start // size, -(-end // size)) for (start, end), size in zip(box, block, strict=True))
    scales = files[name + SCALE].get_slice(name + SCALE)[slices(around)].float()
    for dim, ((start, end), size) in enumerate(zip(box, block, strict=True)):
        scales = scales.repeat_interleave(size, dim).narrow(dim, start % size, end - start)
    return values.float() * scales


@torch.no_grad()
def fill(part: Part, files: Mapping[str, Any], block: tuple[int, int] | None = None) -> None:
    """Reads one parameter; what files do not have, the padding of a vocabulary, is zero."""
    if sum(size(piece.target) for _, piece in part.pieces) < part.parameter.numel():
        part.parameter.zero_()
    for name, piece in part.pieces:
        values = read_box(files, name, piece.source, block)
        into = part.parameter[slices(piece.target)]
        into.copy_(values.reshape(into.shape))


@torch.no_grad()
def exchange(
    whole: Whole,
    mine: Mapping[Box, tuple[Tensor, Box]],
    value: Value,
    *,
    to: int,
    device: torch.device,
) -> Tensor | None:
    """Sends the parts of one tensor to rank `to`, in one message from each rank; there, the tensor."""
    rank = dist.get_rank()
    by_sender: dict[int, list[Box]] = defaultdict(list)
    for box, holders in whole.holders.items():
        by_sender[to if to in holders else holders[0]].append(box)
    result = torch.empty(whole.shape, dtype=whole.dtype) if rank == to else None
    operations, arrived = [], []
    for sender, boxes in by_sender.items():
        if sender == rank:
            parts = [value(mine[box][0])[slices(mine[box][1])] for box in boxes]
            message = torch.cat([part.reshape(-1) for part in parts])
        elif rank == to:
            message = torch.empty(sum(map(size, boxes)), dtype=whole.dtype, device=device)
        else:
            continue
        if rank == to:
            arrived.append((message, boxes))
        if sender != to:
            call, other = (dist.irecv, sender) if rank == to else (dist.isend, to)
            operations.append(dist.P2POp(call, message, other))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    if result is not None:
        for message, boxes in arrived:
            for part, box in zip(message.split([size(box) for box in boxes]), boxes, strict=True):
                into = result[slices(box)]
                into.copy_(part.view(into.shape))
    return result
