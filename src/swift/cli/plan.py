"""`swift plan`: what a training command would take, without weights and without torch.

Owns: GPUs that are planned for, what is printed, and advice where it does not fit. Not here: formulas
(plan_memory.py), what the flags mean for them (plan_job.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

from swift.cli import main
from swift.cli.commands import find_command
from swift.cli.launch import find_wrapped
from swift.cli.launch_node import list_gpus
from swift.cli.plan_job import find_course, find_job
from swift.cli.plan_memory import GIB, Job, find_peak, find_rate, sampling, tokens_per_second
from swift.config.layout import LayoutConfig, model_sizes, suggest
from swift.config.megatron_runs import OnMegatron
from swift.config.option import ConfigError, build
from swift.config.plan import GPUS, PlanRun
from swift.utils import env

RESERVED_GIB = 1.5  # CUDA's context, buffers of NCCL, gaps of the allocator
GPUS_OF_A_NODE = 8
MICRO = "per_device_train_batch_size"
WHOLE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SMALLER: tuple[dict[str, Any], ...] = (  # ways to take less memory, those that cost least speed first
    {"optim": "adamw_torch_fused"}, {"gradient_checkpointing": True}, {"sleep_level": 1}, {"fsdp": "fsdp2"},
    {MICRO: 1}, *({"sequence_parallel_size": size} for size in (2, 4, 8)), {"deepspeed": "zero3_offload"},
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """A command, as its config and as values by flag, for so many GPUs of a kind."""

    run: Any
    values: dict[str, Any]
    world: int
    kind: str
    job: Job

    @property
    def needed_gib(self) -> float:
        return sum(find_peak(self.job)[1].values()) / GIB + RESERVED_GIB

    @property
    def fits(self) -> bool:
        return self.needed_gib <= GPUS[self.kind].memory_gib

    def alter(self, changes: dict[str, Any], times: int = 1) -> "Planned | None":
        """The command with other flags and more GPUs, None where it is impossible or does not fit either."""
        values = self.values | changes
        try:
            run = build(type(self.run), values)
            run.check()
            other = plan_for(run, values, self.world * times, self.kind)
        except ConfigError:
            return None
        return other if other.fits else None


def plan_for(run: Any, values: dict[str, Any], world: int, kind: str) -> Planned:
    return Planned(run, values, world, kind, find_job(run, world, GPUS[kind].memory_gib * GIB))


def run_plan(plan: PlanRun) -> int:
    """Entry of `swift plan`; 1 where the training would not fit."""
    words, launched = unwrap(list(plan.command))
    _, run, values = main.understand(words[0], words[1:])
    asked = int(env.read("NPROC_PER_NODE") or 0) * int(env.read("NNODES") or 1)
    world = plan.gpus or launched or asked or env.count_gpus() or 1
    planned = plan_for(run, values, world, plan.gpu or find_kind())
    main.show("\n".join([*describe_job(planned), *describe_course(planned, plan)]))
    return 0 if planned.fits else 1


def unwrap(words: list[str]) -> tuple[list[str], int | None]:
    """The training command, and its processes where `swift launch` in front of it says how many."""
    if words[1] != "launch":
        return words, None
    at = find_wrapped(words[1:]) + 1
    run, _ = main.build_config(main.read_flags(find_command("swift", "launch"), words[2:at], words[at:])[0])
    each = run.nproc_per_node or int(env.read("NPROC_PER_NODE") or GPUS_OF_A_NODE)
    return words[at:], sum(slots or each for _, slots in run.hosts)


def find_kind() -> str:
    """The kind of this machine's first GPU. ConfigError where there is none that is known."""
    found = list_gpus()
    for name, mebibytes, _ in found[:1]:
        for kind, gpu in GPUS.items():
            if kind.partition("-")[0] in name.replace(" ", "") and abs(mebibytes / 1024 - gpu.memory_gib) < 4:
                return kind
    said = f"{found[0][0]} is not known" if found else "there is no GPU here"
    raise ConfigError(f"{said}: for which one shall it be planned?", hint=f"--gpu {' | '.join(GPUS)}")


def describe_job(planned: Planned) -> Iterator[str]:
    """The model, the GPUs, the memory of one by part, and what to do where it is too much."""
    job, limit = planned.job, GPUS[planned.kind].memory_gib
    layout, shape = job.layout, job.shape
    trained = f"{job.adapters / 1e6:,.1f} M of adapters trained" if job.adapters else "all of them trained"
    active = f", {shape.active / 1e9:,.2f} G for a token" if shape.routed else ""
    yield f"model     {shape.parameters / 1e9:,.2f} G parameters{active}, {trained}"
    degrees = {name: getattr(layout, name) for name in ("tensor", "pipeline", "context", "expert", "data")}
    how = {"none": "a copy each", "distributed": "optimizer sliced"}.get(
        job.slicing, f"{job.slicing} over all"
    )
    parts = [f"{name} {size}" for name, size in degrees.items() if size > 1]
    yield f"GPUs      {planned.world} x {planned.kind}: {', '.join([*parts, how])}"
    moment, held = find_peak(job)
    yield f"memory    of the fullest GPU in GiB, when {moment}"
    for name, size in {**held, "CUDA, NCCL, gaps": RESERVED_GIB * GIB}.items():
        if size >= GIB / 20:
            yield f"          {name:<24}{size / GIB:8.1f}"
    verdict = "fits" if planned.fits else "DOES NOT FIT"
    yield f"          {'together':<24}{planned.needed_gib:8.1f} of {limit:.1f}: {verdict}"
    if not planned.fits:
        nothing = "no other layout fits: lower --max_length, train adapters, or take larger GPUs"
        yield f"advice    {next(find_advice(planned), nothing)}"


def describe_course(planned: Planned, plan: PlanRun) -> Iterator[str]:
    """Steps, rate and time, where they come from, and all of it in one line."""
    job, gpu, world = planned.job, GPUS[planned.kind], planned.world
    course = find_course(planned.run, plan, job)
    rate, source = find_rate(job)
    speed = tokens_per_second(job, gpu.teraflops, course.length)
    seconds = course.tokens / speed / world
    yield f"step      {course.tokens:,.0f} tokens; {speed:,.0f} tokens/s a GPU, {seconds:,.1f} s"
    if course.sampled:
        at_once, sampled = sampling(job, gpu, answers=course.answers, length=course.length)
        more, cache = course.sampled / sampled / world, at_once * job.shape.cache * course.length / GIB
        yield f"          and {more:,.1f} s for answers, {at_once} at once on a GPU: {cache:.1f} GiB of cache"
        seconds += more
    yield f"estimate  MFU {100 * rate:.0f} % of {gpu.teraflops:g} TFLOP/s, from {source}"
    yield from (f"guessed   {guess}" for guess in course.guesses)
    short = f"{planned.needed_gib:.0f} of {gpu.memory_gib:.0f} GiB on {world} x {planned.kind}"
    if course.steps is None:
        yield f"in short  {short}; {speed:,.0f} tokens/s a GPU; --rows says how many rows there are"
        return
    hours = course.steps * seconds / 3600
    time = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.1f} min"
    yield (
        f"in short  {short}; {course.steps:,} steps of {course.tokens:,.0f} tokens; {time}, "
        f"{hours * world:,.1f} GPU-hours (estimate, MFU {100 * rate:.0f} %)"
    )


def find_advice(planned: Planned) -> Iterator[str]:
    """Flags with which it fits, the nearest first, then more GPUs."""
    parallel = isinstance(planned.run, OnMegatron)
    names = (MICRO, "micro_batch_size" if parallel else MICRO)
    ways = list(layout_ways(planned) if parallel else plain_ways())
    for times in (1, 2, 4, 8, 16, 32):
        for changes in ways if times == 1 else ({}, *ways[:4]):
            other = planned.alter(changes, times)
            if other:
                new = {name: value for name, value in changes.items() if planned.values.get(name) != value}
                words = [f"--{name} {str(value).lower()}" for name, value in new.items()]
                told = " ".join(words if times == 1 else [f"{other.world} GPUs", *words])
                yield f"{told.replace(*names)}: {other.needed_gib:.1f} GiB"


def plain_ways() -> Iterator[dict[str, Any]]:
    for count in (1, 2, 3):
        for chosen in combinations(SMALLER, count):
            yield {name: value for way in chosen for name, value in way.items()}


def layout_ways(planned: Planned) -> Iterator[dict[str, Any]]:
    """Recomputing all layers, then other layouts, the nearest first, as they are and with it."""
    yield WHOLE
    flags, names = planned.run.megatron, [field.name for field in fields(LayoutConfig)]
    for other in suggest(flags, planned.world, model_sizes(planned.job.shape.config), count=None):
        changes = {
            name: getattr(other, name) for name in names if getattr(other, name) != getattr(flags, name)
        }
        if changes.get(names[0], flags.tensor_model_parallel_size) > 1:
            changes["sequence_parallel"] = True
        yield from (changes, changes | WHOLE, changes | WHOLE | {MICRO: 1})
