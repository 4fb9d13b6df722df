"""`--to_mcore` and `--to_hf`: model directories between HuggingFace's format and megatron-core's.

Owns: what is converted to where, whether it fits into memory and onto the disk, files beside the weights. A
directory appears whole or not at all.
Not here: the weights (engines/megatron/convert.py), whether they are right (precision.py).
"""

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from swift import __version__
from swift.config.export import ExportOptions
from swift.config.layout import Layout, choose_layout, model_sizes
from swift.config.megatron_runs import MegatronExportRun
from swift.config.option import ConfigError
from swift.config.runs import ExportRun
from swift.engines.megatron.bridge import open_weights
from swift.engines.megatron.convert import (
    build_model,
    compute_logits,
    read_weights,
    round_to,
    sharing,
    sum_up,
    write_hf,
    write_mcore,
)
from swift.engines.ranks import Ranks
from swift.export.merge import MergePlan, merge_adapter
from swift.export.precision import compute_hf, describe, encode_row, report
from swift.export.run import check_output, choose_dtype, parse_size
from swift.export.staging import CONFIG, copy_texts, place, staging_beside
from swift.models.adapters import RUN_ARGS, adapter_base, load_run_args
from swift.models.directory import read_json
from swift.models.hub import resolve_adapter, resolve_model
from swift.models.load import load_config, pick_device
from swift.models.mcore import TRACKER, McoreCheckpoint, find_weights, last_checkpoint
from swift.utils import env
from swift.utils.files import format_bytes, write_json, write_manifest
from swift.utils.log import console, say

Run = ExportRun | MegatronExportRun


@dataclass(frozen=True)
class Plan:
    """What is converted, and where it goes; all paths exist except `output`."""

    to_mcore: bool
    weights: Path  # a HF directory, or that of an iteration of megatron-core
    is_hf: bool  # which of the two
    config: Path  # HF directory with config.json and the tokenizer
    name: str  # of the model, as users know it
    args: dict[str, Any]  # args.json of the run that wrote the weights
    output: Path
    dtype: str  # of the written weights
    layout: Layout
    device: torch.device  # of comparisons
    adapter: Path | None


def run_export_megatron(run: Run) -> int:
    """The whole conversion; the exit code says whether the result computes what it was made from."""
    run.check()
    options = run.export
    plan = make_plan(run)
    if plan.adapter and plan.is_hf:
        return merge_adapter(plan_fold(plan, plan.adapter, plan.weights, options))
    check_room(plan, compares=options.test_convert_precision)
    with sharing(plan.layout, plan.device) as (ranks, device), staging_for(plan, ranks) as staging:
        convert(plan, staging, ranks, shard_bytes=parse_size(options.max_shard_size))
        code = 0
        if options.test_convert_precision and not compare(
            plan, staging, ranks, device, options.test_convert_dtype
        ):
            say(f"{plan.output} was not written", style="red")
            code = 1
        if not code and ranks.is_main:
            code = finish(plan, staging, options)
        return ranks.share(code)


def make_plan(run: Run) -> Plan:
    """Resolves and checks everything; ConfigError before anything large is read."""
    options = run.export
    adapter = None
    if options.mcore_adapters:
        named = Path(options.mcore_adapters)
        adapter = resolve_adapter(str(last_checkpoint(named) or named), **run.model.hub)
    found: Path | McoreCheckpoint
    if options.mcore_model:
        found = find_weights(Path(options.mcore_model))
        args = load_run_args(found) if isinstance(found, Path) else found.args
        config = found if isinstance(found, Path) else config_directory(run, found)
        name = run.model.model or str(args.get("model") or config)
    else:
        name = run.model.model or str((adapter and adapter_base(adapter)) or "")
        found = config = resolve_model(name, revision=run.model.model_revision, **run.model.hub)
        args = load_run_args(found)
    contents = read_json(config / CONFIG)
    if "quantization_config" in contents:
        raise ConfigError(f"{config} is quantised: only plain weights can be converted")
    dtype = choose_dtype(run.model.torch_dtype, contents)
    if run.megatron.context_parallel_size > 1:
        raise ConfigError("--context_parallel_size has no effect on weights", hint="leave it out")
    world = int(env.read("WORLD_SIZE", "1") or 1)
    return Plan(
        to_mcore=options.to_mcore,
        weights=found if isinstance(found, Path) else found.weights,
        is_hf=isinstance(found, Path),
        config=config,
        name=name,
        args=args,
        output=choose_output(run, found, name),
        dtype=dtype,
        layout=choose_layout(run.megatron, world=world, sizes=model_sizes(contents)),
        device=pick_device(run.model.device),
        adapter=adapter,
    )


def config_directory(run: Run, found: McoreCheckpoint) -> Path:
    """Where config.json and the tokenizer are: with the weights, else with the model they were made from."""
    if found.config_directory:
        return found.config_directory
    named = run.model.model or found.model
    return resolve_model(named, revision=run.model.model_revision, **run.model.hub)


def choose_output(run: Run, found: Path | McoreCheckpoint, name: str) -> Path:
    """--output_dir, or the source's name with -mcore, in this directory, or -hf, beside it."""
    source = found if isinstance(found, Path) else found.directory
    default = (
        Path(f"{Path(name).name}-mcore") if run.export.to_mcore else source.with_name(f"{source.name}-hf")
    )
    return check_output(Path(run.export.output_dir or default), source, exist_ok=run.export.exist_ok)


def check_room(plan: Plan, *, compares: bool) -> None:
    """Memory for the largest thing at a time, disk for the result; ConfigError before anything is read."""
    count = count_numbers(plan)
    written = count * getattr(torch, plan.dtype).itemsize
    # Of the two models that are compared each is there alone, in float32.
    needed = count * 4 if compares else written // plan.layout.world
    free = free_memory()
    if needed > free:
        raise ConfigError(
            f"converting {plan.name} takes {format_bytes(needed)} of host memory, "
            f"and {format_bytes(free)} are free",
            hint="leave --test_convert_precision out"
            if compares and written < free
            else "megatron export shares the model: NPROC_PER_NODE, --pipeline_model_parallel_size",
        )
    existing = next(parent for parent in plan.output.parents if parent.is_dir())
    disk = shutil.disk_usage(existing).free
    if written > disk:
        raise ConfigError(
            f"--output_dir {plan.output}: the result takes {format_bytes(written)}, "
            f"and {format_bytes(disk)} are free"
        )


def count_numbers(plan: Plan) -> int:
    """Numbers in the weights, from the headers or the sizes of their files."""
    if not plan.is_hf:
        return sum(f.stat().st_size for f in plan.weights.glob("__*")) // getattr(torch, plan.dtype).itemsize
    with ExitStack() as stack:
        files = open_weights(plan.weights, stack)
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name, file in files.items())


def free_memory() -> int:
    """Bytes that this machine, or the container we are in, has left for us."""
    left = []
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) * 1024)
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdecimal():
        left.append(int(limit.read_text()) - int(used.read_text()))
    return min(left, default=2**62)


@contextmanager
def staging_for(plan: Plan, ranks: Ranks) -> Iterator[Path]:
    """A directory beside the output that all ranks write into; nothing of it stays."""
    with staging_beside(plan.output) if ranks.is_main else nullcontext(Path()) as staging:
        yield ranks.share(staging)


@contextmanager
def progress_of(what: str, total: int) -> Iterator[Any]:
    """A bar of bytes with rate and time left, afterwards one line; gives what is told of bytes."""
    start = time.monotonic()
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
    say(f"{what}: {format_bytes(total)} in {time.monotonic() - start:.1f} s")


def convert(plan: Plan, staging: Path, ranks: Ranks, *, shard_bytes: int) -> None:
    """Weights into `staging`, and on rank 0 all that belongs to them."""
    say(f"{'to megatron-core' if plan.to_mcore else 'to HuggingFace'}: {plan.weights} as {plan.dtype}")
    model = build_model(load_config(plan.config), plan.layout, getattr(torch, plan.dtype))
    size = sum(parameter.nbytes for chunk in model.chunks for parameter in chunk.parameters())
    with progress_of("read", size) as seen:
        read_weights(model, plan.weights, is_hf=plan.is_hf, seen=seen)
    if plan.to_mcore:
        with progress_of("written", size) as seen:
            write_mcore(model, staging, seen)
    else:
        with progress_of("written", size * ranks.world) as seen:
            write_hf(model, staging, ranks=ranks, shard_bytes=shard_bytes, seen=seen)
    if ranks.is_main:
        write_rest(plan, staging)
    ranks.barrier()


def write_rest(plan: Plan, staging: Path) -> None:
    """Config and tokenizer files as published, and args.json, which names the model."""
    copy_texts(plan.config, staging)
    config = read_json(plan.config / CONFIG)
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]
    write_json(staging / CONFIG, config | dict.fromkeys(names, plan.dtype))
    own: dict[str, Any] = {
        "command": "export", "swift_version": __version__, "torch_dtype": plan.dtype,
        "model_type": config.get("model_type"), "adapters": [],
    }  # fmt: skip
    own |= {"model": plan.name} if plan.to_mcore else {"model": str(plan.output), "model_revision": None}
    write_json(staging / RUN_ARGS, plan.args | own)


def compare(plan: Plan, staging: Path, ranks: Ranks, device: torch.device, dtype: str) -> bool:
    """Logits of both formats; whether they agree. Each model is in memory alone."""
    gc.collect()
    say(f"comparing logits in {dtype} on {device.type}")
    computed = getattr(torch, dtype)
    hf_weights = plan.weights if plan.to_mcore else staging
    ids, answers = encode_row(plan.config)
    theirs = None
    if ranks.is_main:
        theirs = compute_hf(hf_weights, ids, written=plan.dtype, dtype=computed, device=device)
        gc.collect()
    model = build_model(load_config(plan.config), plan.layout, computed)
    mcore = staging / "iter_0000001" if plan.to_mcore else plan.weights
    read_weights(model, mcore, is_hf=plan.is_hf and not plan.to_mcore, seen=lambda _: None)
    round_to(model, getattr(torch, plan.dtype))
    describe("mcore", sum_up(tensor for _, tensor in model.bridge.export(model.chunks)))
    ours = compute_logits(model, ids, ranks=ranks, device=device)
    return ranks.share(theirs is None or ours is None or report(theirs, ours, answers, dtype))


def finish(plan: Plan, staging: Path, options: ExportOptions) -> int:
    """Gives the directory its name, with adapters folded in where there are some; the exit code."""
    if plan.adapter:
        return merge_adapter(plan_fold(plan, plan.adapter, staging, options))
    if plan.to_mcore:
        write_manifest(staging)
    last = TRACKER if plan.to_mcore else CONFIG
    place(staging, plan.output, exist_ok=options.exist_ok, about=plan.dtype, last=last)
    return 0


def plan_fold(plan: Plan, adapter: Path, base: Path, options: ExportOptions) -> MergePlan:
    """How adapters are folded into a HF directory."""
    return MergePlan(
        adapter=adapter,
        base=base,
        base_name=plan.name,
        output=plan.output,
        dtype=plan.dtype,
        device=torch.device("cpu"),
        max_shard_bytes=parse_size(options.max_shard_size),
        exist_ok=options.exist_ok,
        run_args=load_run_args(adapter),
    )
