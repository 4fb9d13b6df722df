"""The weights of a model that is being trained, as its published files have them, on every rank.

Not here: whoever takes them (rollout/), the files of a checkpoint (checkpoint.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swift.engines.megatron.bridge import IN_LAYER, Bridge, collect, unwrap
from swift.engines.megatron.lora import Adapter, AdapterBridge, ExpertAdapter, LinearAdapter


@dataclass(frozen=True)
class Addend:
    """What is added to one tensor of the model's files: scaling * B A of whole factors, A and B in turn."""

    names: tuple[str, str]
    scaling: float
    places: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # in factors of all experts


def addends_of(chunks: Sequence[nn.Module], bridge: Bridge) -> dict[str, Addend]:
    """Those of this rank's adapters, by the names of the tensors."""
    found: dict[str, Addend] = {}
    for chunk in map(unwrap, chunks):
        for name, adapter in chunk.named_modules():
            inside = IN_LAYER.match(name) if isinstance(adapter, Adapter) else None
            if inside is None:
                continue
            number = chunk.decoder.layers[int(inside[1])].layer_number - 1
            row = bridge.rows[f"{name[inside.end() :].removesuffix('.lora')}.weight"]
            for i, file in enumerate(file.format(number) for file in row.files):
                shares = adapter.shares
                if isinstance(adapter, ExpertAdapter):
                    names = shares["A"].name, shares["B"].name
                    for expert in range(shares["A"].whole[0]):
                        places = (expert,), (expert, i)
                        found[file.replace("*", str(expert))] = Addend(names, adapter.scaling, places)
                elif isinstance(adapter, LinearAdapter) and adapter.names[i]:
                    end = adapter.names[i]
                    scaling = adapter.scalings[[n for n in adapter.names if n].index(end)]
                    found[file] = Addend((shares[f"A_{end}"].name, shares[f"B_{end}"].name), scaling)
    return found


@dataclass(frozen=True)
class Merging:
    """What adapters add to the tensors of files; `factors` are there on rank 0 alone."""

    addends: dict[str, Addend]
    factors: dict[str, Tensor]

    @classmethod
    def of(cls, chunks: Sequence[nn.Module], bridge: Bridge) -> "Merging":
        """That of all ranks' adapters. Called by all of them."""
        every = collect(addends_of(chunks, bridge))
        addends = {name: addend for theirs in every for name, addend in theirs.items()}
        if not addends:
            return cls({}, {})
        return cls(addends, {n: whole for n, whole in AdapterBridge().export(chunks) if whole is not None})

    def add(self, name: str, weight: Tensor) -> Tensor:
        """`weight` with its adapter: a sum in float32 at least, in the dtype of the weight."""
        addend = self.addends.get(name)
        if addend is None:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        factors = (self.factors[n][place] for n, place in zip(addend.names, addend.places, strict=True))
        a, b = (factor.to(weight.device, wide) for factor in factors)
        return torch.addmm(weight.to(wide), b, a, alpha=addend.scaling).to(weight.dtype)


@torch.no_grad()
def stream_weights(
    chunks: Sequence[nn.Module], bridge: Bridge, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """(name in files, whole tensor) in one order on all ranks, which all go through to the end.

    One whole tensor is in memory at a time, and on rank 0 the factors of all adapters.
    """
    merging, wholes = Merging.of(chunks, bridge), bridge.wholes(chunks)
    for name, tensor in bridge.export(chunks):
        whole = wholes[name]
        empty = torch.empty(whole.shape, dtype=whole.dtype, device=device)
        shared = empty if tensor is None else merging.add(name, tensor.to(device))
        dist.broadcast(shared, 0)
        yield name, shared
