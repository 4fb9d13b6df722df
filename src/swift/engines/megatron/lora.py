"""LoRA beside the layers of megatron-core: PEFT's function, cut over ranks as the layers are.

Every projection that megatron-core fuses with others (queries, keys and values; gate and up) has factors of
its own, so that the trained model is the one that adapter files describe. Of a layer whose outputs are cut,
A is whole and B cut; of one whose inputs are cut, A is cut and B whole. What tensor ranks exchange has the
width of the rank, never that of the layer.
Not here: which weights have adapters and how these start (models/outline.py), files (checkpoint.py).
Shapes: t = tokens of this rank, r = rank of an adapter, e = experts of this rank, E = all, n = their tokens.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn
from transformers import PretrainedConfig

from swift.config.option import ConfigError
from swift.engines.megatron.bridge import IN_LAYER, Bridge, Part, unwrap
from swift.engines.megatron.experts import GroupedExperts, StackedLinear
from swift.engines.megatron.latent import WholeLinear
from swift.engines.megatron.layers import Head
from swift.engines.megatron.pieces import Piece, Shape, box_of
from swift.engines.megatron.settings import Settings
from swift.engines.megatron.tables import HEAD, LAYER, Row, rows_of
from swift.models.outline import PREFIX, Factors, Outline

KINDS = ("qkv", "gate_up", "row", "column", "whole")  # of parameters that may have adapters
GROUPED = 8  # grouped products want rows of a multiple of 16 bytes

Cuts = tuple[tuple[int, int, int], ...]  # (axis, which part, of how many)


@dataclass(frozen=True)
class Share:
    """Where a factor of this rank lies in the whole one, and which copy of it this is.

    name: of the whole one, in adapter files. There it is a matrix; of experts it is seen here as
        [E, r, in] or [E, projections, out, r].
    """

    name: str
    whole: Shape
    cuts: Cuts
    replica: tuple[int, int, int]

    def take(self, whole: Tensor) -> Tensor:
        for axis, which, count in self.cuts:
            whole = whole.chunk(count, axis)[which]
        return whole.clone(memory_format=torch.contiguous_format)


class Adapter(nn.Module):
    """The adapters of one layer. `shares` are of its parameters, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.shares: dict[str, Share] = {}

    def hold(self, name: str, share: Share, whole: Tensor) -> nn.Parameter:
        """A trained parameter with this rank's share of `whole`."""
        device = torch.cuda.current_device()
        parameter = nn.Parameter(share.take(whole.view(share.whole)).to(device))
        self.register_parameter(name, parameter)
        self.shares[name] = share
        return parameter


class LinearAdapter(Adapter):
    """Beside a layer of megatron-core that is cut over tensor ranks, or whole on each.

    outer: the layer leaves it to others to add up its output over tensor ranks, as shared experts do that
        are computed while tokens travel. A factor that is whole then sees a part on every rank, and its
        gradient is added up where it is made.
    """

    def __init__(
        self, layer: nn.Module, projections: Sequence[Factors | None], widths: Sequence[int], groups: int
    ) -> None:
        """`projections` of the layer in their order, None without an adapter; `widths` of their outputs here.

        groups: how often, on this rank, all projections follow each other in the output.
        """
        super().__init__()
        self.names = [None if f is None else f.stem.rpartition(".")[2] for f in projections]
        self.widths, self.groups = list(widths), groups
        present = [f for f in projections if f is not None]
        self.sizes = [f.rank for f in present]
        self.scalings = [f.scaling for f in present]
        self.dropout = present[0].dropout
        self.by_column, is_whole = isinstance(layer, ColumnParallelLinear), isinstance(layer, WholeLinear)
        self.outer = bool(layer.explicit_expert_comm)
        sequence = bool(layer.sequence_parallel) and not self.outer
        alone = self.outer or is_whole
        self.across = choose_exchange(by_column=self.by_column, sequence=sequence, alone=alone)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        # Where ranks hold different activations they draw different numbers.
        self.draws_apart = ranks > 1 and (sequence or not self.by_column)
        for end, factors in zip(filter(None, self.names), present, strict=True):
            for side, name, whole in zip("AB", factors.names, (factors.a, factors.b), strict=True):
                is_cut = not is_whole and (side == "B") == self.by_column
                share = tensor_share(name, tuple(whole.shape), 0 if self.by_column else 1, is_cut=is_cut)
                parameter = self.hold(f"{side}_{end}", share, whole)
                if is_cut:
                    set_tensor_model_parallel_attributes(parameter, True, share.cuts[0][0], 1)
                else:  # megatron-core adds up such gradients over tensor ranks
                    parameter.sequence_parallel = sequence  # type: ignore[attr-defined]

    def factor(self, side: str, name: str, dtype: torch.dtype) -> Tensor:
        weight = getattr(self, f"{side}_{name}")
        if self.outer and (side == "A") == self.by_column:
            weight = copy_to_tensor_model_parallel_region(weight)
        return weight.to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added to the layer's output, from its input [t, 1, in]."""
        names = [name for name in self.names if name]
        dropped = self.drop(hidden)
        low = self.across(F.linear(dropped, torch.cat([self.factor("A", n, hidden.dtype) for n in names])))
        lows = iter(
            F.linear(part * scaling, self.factor("B", name, hidden.dtype))
            for part, scaling, name in zip(low.split(self.sizes, -1), self.scalings, names, strict=True)
        )
        if self.names == names and len(names) == 1:
            return next(lows)
        outputs = [
            next(lows) if name else low.new_zeros(*low.shape[:-1], width)
            for name, width in zip(self.names, self.widths, strict=True)
        ]
        return torch.cat([x.unflatten(-1, (self.groups, -1)) for x in outputs], -1).flatten(-2)

    def drop(self, hidden: Tensor) -> Tensor:
        """One draw for all projections of the layer, where PEFT draws for each: each alone sees the same."""
        if not self.dropout or not self.training:
            return hidden
        if not self.draws_apart:
            return F.dropout(hidden, self.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(hidden, self.dropout)


def choose_exchange(*, by_column: bool, sequence: bool, alone: bool) -> Callable[[Tensor], Tensor]:
    """From what A makes of this rank's activations to what B takes, [t, 1, r] both."""
    if alone:
        return nn.Identity()
    if by_column:
        return gather_from_sequence_parallel_region if sequence else copy_to_tensor_model_parallel_region
    if sequence:
        return reduce_scatter_to_sequence_parallel_region
    return reduce_from_tensor_model_parallel_region


class ExpertAdapter(Adapter):
    """Beside the experts of a rank: factors for each, in grouped products. PEFT has no dropout for these.

    Expert-tensor ranks have whole tokens and make partial sums, as the layer itself does; gradients of
    factors that they all hold are therefore added up.
    """

    def __init__(self, layer: StackedLinear, experts: GroupedExperts, factors: Factors) -> None:
        super().__init__()
        self.scaling, self.group, self.is_first = factors.scaling, experts.groups.expt_tp, layer.cut == 0
        self.whole_side = "A" if self.is_first else "B"
        total = experts.groups.ep.size() * experts.count
        parts = 2 if self.is_first else 1
        a = factors.a.view(total, factors.rank, -1)
        b = factors.b.view(parts, -1, factors.rank, total).permute(3, 0, 1, 2)
        for side, name, whole in zip("AB", factors.names, (a, b), strict=True):
            is_cut = side != self.whole_side
            share = expert_share(name, tuple(whole.shape), experts.groups, is_cut=is_cut)
            parameter = self.hold(side, share, whole.contiguous())
            # As the layer's own weight; but each gradient enters the norm once.
            set_tensor_model_parallel_attributes(parameter, True, 2, 1)
            parameter.allreduce = layer.weight.allreduce  # type: ignore[attr-defined]
            parameter.shared = not is_cut and self.group.rank() > 0  # type: ignore[attr-defined]

    def factor(self, side: str, dtype: torch.dtype) -> Tensor:
        weight = getattr(self, side)
        if side == self.whole_side:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.group)
        return weight.to(dtype)

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """What is added to [n, out]; tokens [n, in] sorted by expert, ends int32 [e]."""
        a, b = self.factor("A", tokens.dtype), self.factor("B", tokens.dtype).flatten(1, 2)
        missing = -a.shape[1] % GROUPED
        if missing:
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        low = F.grouped_mm(tokens, a.transpose(1, 2), offs=ends)
        return F.grouped_mm(low * self.scaling, b.transpose(1, 2), offs=ends)


def tensor_share(name: str, whole: Shape, axis: int, *, is_cut: bool) -> Share:
    """Of a factor, cut along `axis` or the same on all tensor ranks."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return Share(name, whole, ((axis, rank, ranks),) if is_cut else (), (0, 0 if is_cut else rank, copy))


def expert_share(name: str, whole: Shape, groups: Any, *, is_cut: bool) -> Share:
    """Of factors of experts, which are spread over expert ranks and cut along axis 2 or the same on these."""
    rank = groups.expt_tp.rank()
    inner = ((2, rank, groups.expt_tp.size()),) if is_cut else ()
    cuts = ((0, groups.ep.rank(), groups.ep.size()), *inner)
    return Share(name, whole, cuts, (0, 0 if is_cut else rank, groups.expt_dp.rank()))


def weights_of(row: Row) -> tuple[str, ...]:
    """The weights of transformers' model that a kind of parameter consists of; `{}` is the layer."""
    if "*" not in row.files[0]:
        return row.files
    return (f"{LAYER}mlp.experts.{'gate_up_proj' if row.kind == 'gate_up' else 'down_proj'}",)


def check_places(hf: PretrainedConfig, outline: Outline) -> None:
    """ConfigError for an adapter beside something that has none here."""
    places = {name for row in rows_of(hf).values() if row.kind in KINDS for name in weights_of(row)}
    for name in outline.factors:
        if re.sub(r"(?<=\.layers\.)\d+(?=\.)", "{}", name) not in places:
            raise ConfigError(
                f"--target_modules: megatron has no adapters for {name}",
                hint="all-linear, or names of linear layers in attention and MLP",
            )


def add_adapters(
    chunks: Sequence[GPTModel], hf: PretrainedConfig, settings: Settings, outline: Outline
) -> None:
    """Freezes the chunks of this rank and puts its share of all adapters beside their layers."""
    rows = rows_of(hf)
    for chunk in chunks:
        chunk.requires_grad_(False)
        every = [m for m in chunk.modules() if isinstance(m, GroupedExperts)]
        experts = {id(layer): m for m in every for layer in (m.linear_fc1, m.linear_fc2)}
        for name, layer in list(chunk.named_modules()):
            inside = IN_LAYER.match(name)
            row = rows.get(f"{name[inside.end() :]}.weight") if inside else None
            if inside is None or row is None or row.kind not in KINDS:
                continue
            number = chunk.decoder.layers[int(inside[1])].layer_number - 1
            found = [outline.factors.get(weight.format(number)) for weight in weights_of(row)]
            if not any(found):
                continue
            if isinstance(layer, StackedLinear):
                assert found[0] is not None
                layer.lora = ExpertAdapter(layer, experts[id(layer)], found[0])
                layer.register_forward_hook(add_to_experts)
            else:
                assert isinstance(layer, ColumnParallelLinear | RowParallelLinear | WholeLinear)
                layer.lora = LinearAdapter(layer, found, *divide(layer, row.kind, settings))
                layer.register_forward_hook(add_to_linear)
        if settings.head and chunk.post_process:
            hold_head(chunk.output_layer, outline)
        # Nothing before the first layer is trained, and what recomputes sees gradients only where inputs do.
        if (settings.recompute_granularity or settings.recompute_latents) and chunk.pre_process:
            chunk.embedding.register_forward_hook(lambda *call: call[-1].requires_grad_())


def hold_head(head: Head, outline: Outline) -> None:
    """Trains a head whole; it is kept with the adapters."""
    head.requires_grad_(True)
    head.share = tensor_share(f"{PREFIX}{HEAD}", tuple(head.weight.shape), 0, is_cut=False)
    if outline.head is not None:
        with torch.no_grad():
            head.weight.copy_(outline.head)


def divide(layer: nn.Module, kind: str, settings: Settings) -> tuple[list[int], int]:
    """Outputs of each projection of a layer on this rank, and in how many groups they alternate."""
    rows = layer.weight.shape[0]
    if kind in ("row", "column", "whole"):
        return [rows], 1
    if kind == "gate_up":
        return [rows // 2, rows // 2], 1
    assert settings.num_query_groups is not None
    groups = settings.num_query_groups // settings.tensor_model_parallel_size
    of_key = rows // (settings.num_attention_heads // settings.num_query_groups + 2)
    return [rows - 2 * of_key, of_key, of_key], groups


def add_to_linear(layer: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
    """Hook of a layer that gives out [t, 1, out] and a bias."""
    if not layer.lora.enabled:
        return output
    return output[0] + layer.lora(inputs[0]), output[1]


def add_to_experts(layer: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
    """Hook of a stack of experts, which gives out [n, out]."""
    return output + layer.lora(*inputs) if layer.lora.enabled else output


def adapters_of(chunks: Sequence[nn.Module]) -> list[Adapter]:
    """The adapters of every layer of this rank."""
    return [m for chunk in chunks for m in unwrap(chunk).modules() if isinstance(m, Adapter)]


def shares_of(chunks: Sequence[nn.Module]) -> Iterator[tuple[nn.Parameter, Share]]:
    """Every factor of this rank, and a head that is trained beside them."""
    for adapter in adapters_of(chunks):
        for name, share in adapter.shares.items():
            yield adapter.get_parameter(name), share
    for chunk in map(unwrap, chunks):
        if chunk.post_process and isinstance(chunk.output_layer, Head):
            yield chunk.output_layer.weight, chunk.output_layer.share


class AdapterBridge(Bridge):
    """Gathers factors as the weights of a model are gathered."""

    def __init__(self) -> None:
        """Names and cuts are those of the shares."""

    def parts(self, chunks: Sequence[nn.Module]) -> list[Part]:
        found = []
        for parameter, share in shares_of(chunks):
            source = list(box_of(share.whole))
            for axis, which, _ in share.cuts:
                size = parameter.shape[axis]
                source[axis] = (which * size, (which + 1) * size)
            piece = Piece(0, share.whole, tuple(source), box_of(tuple(parameter.shape)))
            found.append(Part(parameter, [(share.name, piece)]))
        return found

    def tensors(self, chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
        """Whole factors as adapter files have them, on rank 0; empty elsewhere. Called by all ranks."""
        return {name: as_matrix(whole) for name, whole in self.export(chunks) if whole is not None}


def as_matrix(whole: Tensor) -> Tensor:
    """A whole factor in PEFT's form."""
    if whole.ndim == 4:
        return whole.permute(1, 2, 3, 0).flatten(2).flatten(0, 1).contiguous()
    return whole.flatten(0, -2)


def adapter_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """The factors of this rank as megatron-core's checkpoints describe tensors."""
    return {
        "model": {
            share.name: ShardedTensor.from_rank_offsets(
                share.name, parameter, *share.cuts, replica_id=share.replica
            )
            for parameter, share in shares_of(chunks)
        }
    }


@torch.no_grad()
def put_adapters(chunks: Sequence[nn.Module], state: Mapping[str, Any]) -> None:
    """What was read for `adapter_state`, into the factors."""
    for parameter, share in shares_of(chunks):
        parameter.copy_(state["model"][share.name])
