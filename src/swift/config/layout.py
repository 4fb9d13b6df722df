"""How the processes of a Megatron job share one model: the degrees, and whether they are possible.

Owns: the flags of the degrees, every rule that a model's config.json decides, and layouts that would work
instead. Not here: process groups (engines/megatron).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from swift.config.option import ConfigError, changed, option

SUGGESTIONS = 2  # layouts that a hint names
DEGREES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size",
)  # fmt: skip
UNEVEN = (
    "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutConfig:
    """How processes share the model: tensor x pipeline x context x data parallel sizes are all of them."""

    tensor_model_parallel_size: int = option(1, "processes that share a layer's matrices, in one node", min=1)
    sequence_parallel: bool = option(False, "share what is between layers over them too: less memory")
    pipeline_model_parallel_size: int = option(1, "processes in a row, each with some layers", min=1)
    virtual_pipeline_model_parallel_size: int | None = option(
        None, "pieces of layers on each pipeline process, for shorter idle times; none = 1", min=1
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers in such a piece, instead of their number", min=1
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first pipeline process; none = as the others", min=1
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "layers of the last pipeline process; none = as the others", min=1
    )
    context_parallel_size: int = option(1, "processes that share the tokens of a batch: for long rows", min=1)
    cp_comm_type: str = option(
        "all_gather",
        "what they exchange: keys and values of all tokens, or heads for tokens (a2a)",
        choices=("all_gather", "a2a"),
    )
    expert_model_parallel_size: int = option(1, "processes that share out the experts of a mixture", min=1)
    expert_tensor_parallel_size: int = option(1, "processes that share every expert's matrices", min=1)


@dataclass(frozen=True, slots=True)
class Layout:
    """The degrees of a job: tensor x pipeline x context x data = world.

    Experts are shared out anew within a pipeline stage:
    expert x expert_tensor x expert_data x pipeline = world.
    """

    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None  # pieces of layers on each pipeline process
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence: bool = False
    layers: tuple[int, ...] = ()  # of each pipeline process

    @property
    def data(self) -> int:
        """Copies of the model, each with rows of its own."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Copies of each expert."""
        return self.world // (self.expert * self.expert_tensor * self.pipeline)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The numbers of a model that decide how it can be shared; no experts in a dense one."""

    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    experts: int = 0
    expert_ffn: int = 0
    grain: int = 1  # columns of an expert come in multiples of it


def keeps_layout(given: Iterable[str], saved: Mapping[str, Any], world: int) -> bool:
    """Whether a run that goes on has the layout it had: none is given, and the old one is for `world` too."""
    if not {*DEGREES, *UNEVEN}.isdisjoint(given):
        return False
    return world % math.prod(saved[name] for name in DEGREES[:3]) == 0


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """From the contents of a config.json."""
    text = config.get("text_config") or config
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((int(text[name]) for name in names if text.get(name)), 0)
    ffn = text.get("intermediate_size") or text.get("moe_intermediate_size")
    heads = text["num_attention_heads"]
    return ModelSizes(
        layers=text["num_hidden_layers"],
        heads=heads,
        # Heads of latent attention have keys of their own, whatever is said of them.
        kv_heads=heads if text.get("kv_lora_rank") else text.get("num_key_value_heads") or heads,
        ffn=ffn,
        vocab=text["vocab_size"],
        experts=experts,
        expert_ffn=(text.get("moe_intermediate_size") or ffn) if experts else 0,
    )


def choose_layout(config: LayoutConfig, *, world: int, sizes: ModelSizes) -> Layout:
    """The layout of `world` processes. ConfigError names the flag, why not, and layouts that would work."""
    fault = next(find_faults(config, world, sizes), None)
    if fault is not None:
        nearest = " or ".join(describe(other) for other in suggest(config, world, sizes))
        hint = f"with {world} process(es) this works: {nearest}" if nearest else "use swift sft"
        raise ConfigError(fault, hint=hint)
    return Layout(
        world=world,
        tensor=config.tensor_model_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
        virtual=pieces(config, sizes.layers),
        context=config.context_parallel_size,
        expert=config.expert_model_parallel_size,
        expert_tensor=config.expert_tensor_parallel_size,
        sequence=config.sequence_parallel and config.tensor_model_parallel_size > 1,
        layers=stage_layers(config, sizes.layers) or (),
    )


def find_faults(config: LayoutConfig, world: int, sizes: ModelSizes) -> Iterator[str]:
    """What is wrong, a line each; the first is the one to tell, later ones may follow from it."""
    tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
    if world % (tensor * config.pipeline_model_parallel_size * context):
        sizes_given = [_flag(config, name) for name in DEGREES[:3] if getattr(config, name) > 1]
        yield f"{' x '.join(sizes_given)} does not divide the {world} process(es)"
    heads = ((sizes.heads, "attention heads"), (sizes.kv_heads, "key-value heads"))
    common = math.gcd(sizes.heads, sizes.kv_heads, sizes.ffn)
    fitting = ", ".join(str(size) for size in range(1, min(common, 64) + 1) if common % size == 0)
    for count, what in (*heads, (sizes.ffn, "feed-forward columns")):
        if count % tensor:
            yield (
                f"{_flag(config, DEGREES[0])} does not divide the model's {count} {what} "
                f"(it can be {fitting})"
            )
    for count, what in heads if config.cp_comm_type == "a2a" else ():
        if count % (tensor * context):
            times = f" x {_flag(config, DEGREES[0])}" if tensor > 1 else ""
            yield (
                f"{_flag(config, DEGREES[2])}{times} does not divide the model's {count} {what}, "
                "as --cp_comm_type a2a needs"
            )
    yield from _pipeline_faults(config, sizes.layers)
    yield from _expert_faults(config, world, sizes)


def _flag(config: LayoutConfig, name: str) -> str:
    return f"--{name} {getattr(config, name)}"


def _pipeline_faults(config: LayoutConfig, layers: int) -> Iterator[str]:
    given = [name for name in UNEVEN if getattr(config, name) not in (None, 1)]
    ends = " and ".join(_flag(config, name) for name in UNEVEN[2:] if name in given)
    if config.pipeline_model_parallel_size == 1 and given:
        yield f"{_flag(config, given[0])} needs --pipeline_model_parallel_size above 1"
    stages = stage_layers(config, layers)
    if stages is None:
        left = f" with {ends}" if ends else ""
        yield f"{_flag(config, DEGREES[1])}{left} does not divide the model's {layers} layers"
        return
    if set(UNEVEN[:2]) <= set(given):
        yield f"--{UNEVEN[0]} and --{UNEVEN[1]} say the same thing twice"
    if UNEVEN[1] in given and ends:
        yield f"{_flag(config, UNEVEN[1])} does not go with {ends}; say --{UNEVEN[0]}"
    for name in UNEVEN[:2]:
        odd = [count for count in stages if count % (getattr(config, name) or 1)]
        if odd:
            yield f"{_flag(config, name)} does not divide the {odd[0]} layers of a pipeline process"


def _expert_faults(config: LayoutConfig, world: int, sizes: ModelSizes) -> Iterator[str]:
    expert, expert_tensor = config.expert_model_parallel_size, config.expert_tensor_parallel_size
    if not sizes.experts:
        yield from (
            f"{_flag(config, name)}: the model has no experts"
            for name in DEGREES[3:]
            if getattr(config, name) > 1
        )
        return
    if sizes.experts % expert:
        yield f"{_flag(config, DEGREES[3])} does not divide the model's {sizes.experts} experts"
    if sizes.expert_ffn % expert_tensor:
        yield f"{_flag(config, DEGREES[4])} does not divide the {sizes.expert_ffn} columns of an expert"
    elif (sizes.expert_ffn // expert_tensor) % sizes.grain:
        leaves = f"{_flag(config, DEGREES[4])} leaves" if expert_tensor > 1 else "the model has"
        yield (
            f"{leaves} {sizes.expert_ffn // expert_tensor} columns of an expert to a process: products of "
            f"experts in this precision need a multiple of {sizes.grain}"
        )
    stage = world // config.pipeline_model_parallel_size
    if not stage or stage % (expert * expert_tensor):
        times = f" x {_flag(config, DEGREES[4])}" if expert_tensor > 1 else ""
        which = "process(es) of a pipeline stage"
        yield f"{_flag(config, DEGREES[3])}{times} does not divide the {stage} {which}"
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        yield f"{_flag(config, DEGREES[0])} with a mixture of experts needs --sequence_parallel true"


def stage_layers(config: LayoutConfig, layers: int) -> tuple[int, ...] | None:
    """Layers of each pipeline process, None where they do not come out even."""
    first, last = config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers
    middle = config.pipeline_model_parallel_size - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    if middle < 0 or left < 0 or (left % middle if middle else left) or (middle and not left):
        return None
    ends = [() if count is None else (count,) for count in (first, last)]
    return ends[0] + (left // middle if middle else 0,) * middle + ends[1]


def pieces(config: LayoutConfig, layers: int) -> int | None:
    """Pieces of layers on each pipeline process; None = one, without interleaving."""
    per_piece = config.num_layers_per_virtual_pipeline_stage
    count = config.virtual_pipeline_model_parallel_size or 1
    if per_piece:
        count = layers // config.pipeline_model_parallel_size // per_piece
    return count if count > 1 else None


def suggest(
    config: LayoutConfig, world: int, sizes: ModelSizes, *, count: int | None = SUGGESTIONS
) -> list[LayoutConfig]:
    """Layouts that `world` processes and the model allow, the nearest to `config` first; None = all."""
    even = replace(config, **dict.fromkeys(UNEVEN))
    parts = [size for size in range(1, world + 1) if world % size == 0]
    choices = (
        parts,
        parts,
        {1, config.context_parallel_size},
        parts if sizes.experts else [1],
        {1, config.expert_tensor_parallel_size} if sizes.experts else [1],
    )
    found: dict[LayoutConfig, float] = {}
    for values in product(*choices):
        sequence = values[0] > 1 and (config.sequence_parallel or sizes.experts > 0)
        for base in (config, even):
            other = replace(base, **dict(zip(DEGREES, values, strict=True)), sequence_parallel=sequence)
            if other not in found and next(find_faults(other, world, sizes), None) is None:
                found[other] = _distance(config, other)
    return sorted(found, key=found.__getitem__)[:count]


def _distance(config: LayoutConfig, other: LayoutConfig) -> float:
    """How far apart: first by the share of the model that one process holds, then by each degree."""
    steps = [math.log2(getattr(other, name) / getattr(config, name)) for name in DEGREES]
    changed = sum(getattr(other, name) != getattr(config, name) for name in UNEVEN)
    return 100 * abs(sum(steps[:3])) + sum(map(abs, steps)) + 0.1 * changed


def describe(config: LayoutConfig) -> str:
    """Its flags as they would be typed."""
    own = {field.name for field in fields(LayoutConfig)}
    words = [f"--{name} {str(getattr(config, name)).lower()}" for name in changed(config) if name in own]
    return " ".join(words) or "every process with the whole model (leave these flags out)"


def micro_batches(layout: Layout, *, global_batch_size: int, micro_batch_size: int) -> int:
    """Micro-batches that a process takes in one step. ConfigError where they do not come out even."""
    rows = micro_batch_size * layout.data
    count, rest = divmod(global_batch_size, rows)
    if rest or not count:
        near = [rows * n for n in (count, count + 1) if n]
        raise ConfigError(
            f"--global_batch_size {global_batch_size} is not a multiple of --micro_batch_size "
            f"{micro_batch_size} x {layout.data} data parallel processes = {rows}",
            hint=f"--global_batch_size {' or '.join(map(str, near))}",
        )
    if layout.virtual and count % layout.pipeline:
        raise ConfigError(
            f"--global_batch_size {global_batch_size} is {count} micro-batches a process: pieces of layers "
            f"need a multiple of --pipeline_model_parallel_size {layout.pipeline}",
            hint=f"--global_batch_size {rows * layout.pipeline * math.ceil(count / layout.pipeline)}",
        )
    return count
