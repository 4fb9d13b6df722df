"""From the flags of a training command to the job that plan_memory.py reckons with, and its course.

Owns: which flags decide memory and speed, how many rows there are, and what has to be guessed about them.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift.cli.plan_memory import Job
from swift.cli.plan_shape import Shape, find_shape
from swift.config.layout import Layout, choose_layout, micro_batches, model_sizes
from swift.config.megatron_runs import OnMegatron
from swift.config.online import ANSWERS, SAMPLES
from swift.config.option import ConfigError
from swift.config.plan import PlanRun
from swift.config.runs import RlhfRun, TrainRun

ROWS_PER_STEP = 16  # as train/preparing.py: what accumulation aims at when it is not given
TOKEN_BYTES = 4.0  # of a local file, names of its columns included
READ_BYTES = 64 << 20  # of a local file that are looked at
PAIRED = ("dpo", "cpo", "simpo", "orpo", "rm")
BESIDE_TRAINING = 0.4  # of a GPU for vLLM, as config/vllm.py says
# Bytes of an optimizer's state of a parameter: how many weights, and what is fixed; AdamW has two weights.
STATES = {
    **dict.fromkeys(("sgd", "adafactor"), (0, 0)), **dict.fromkeys(("muon", "schedule_free_sgd"), (1, 0)),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), (0, 2)), "lion_32bit": (0, 4), "lion_8bit": (0, 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Course:
    """How long a training is; tokens are those of all GPUs in one step."""

    steps: int | None  # None: nobody said how many rows there are
    tokens: float
    sampled: float  # of them, those that the model answers itself
    length: float  # of a row
    answers: int  # that one GPU samples at a time
    guesses: tuple[str, ...]


def find_job(run: Any, world: int, gpu_bytes: float) -> Job:
    """The job of one of `world` processes. ConfigError where they cannot share the model."""
    parallel = isinstance(run, OnMegatron)
    named = run.model.model or (run.megatron.mcore_model if parallel else None)
    if named is None:
        raise ConfigError("--model is missing", hint="plan a run that goes on with the flags it began with")
    shape = find_shape(named)
    layout = find_layout(run, shape, world)
    full, optim = run.tuner.train_type == "full", run.optim.name
    width = weight_bytes(run, shape)
    times, fixed = STATES.get(optim, (0 if optim.startswith("paged") else 2, 0))
    tokens, trained = longest_batch(run, shape)
    job = Job(
        shape=shape,
        layout=layout,
        slicing=zero_stage(run.parallel.zero or ("fsdp2" if run.parallel.fsdp else "none")),
        adapters=0 if full else run.tuner.lora_rank * shape.layers * shape.lora,
        weight_bytes=width,
        moment_bytes=times * width + fixed,
        spare_bytes=width if optim == "adamw_torch" else 0,
        logit_bytes=12 if width < 4 else 16,
        tokens=tokens,
        trained=trained,
        micro_batches=accumulation(run, layout),
        recomputed=float(run.schedule.gradient_checkpointing is not False),
        **(beside(run, shape, gpu_bytes) if isinstance(run, RlhfRun) else {}),
    )
    if not parallel:
        return job
    flags = run.megatron
    count, most = flags.recompute_num_layers or 1, max(layout.layers)
    block = flags.recompute_method == "block"
    return replace(
        job,
        megatron=True,
        slicing="distributed" if flags.use_distributed_optimizer else "none",
        moment_bytes=8,
        spare_bytes=0,  # AdamW in one kernel
        logit_bytes=job.logit_bytes / 2,  # the logits and their gradient alone
        recomputed=(min(count / most, 1) if block else 1.0) * (flags.recompute_granularity == "full"),
        chunk=1 if block else count,
    )


def find_layout(run: Any, shape: Shape, world: int) -> Layout:
    if isinstance(run, OnMegatron):
        layout = choose_layout(run.megatron, world=world, sizes=model_sizes(shape.config))
        run.megatron.check_layers(layout)
        return layout
    size = run.parallel.sequence_parallel_size
    if world % size:
        raise ConfigError(
            f"--sequence_parallel_size {size} does not divide {world} GPU(s)", hint="see --gpus"
        )
    return Layout(world=world, context=size)


def weight_bytes(run: TrainRun, shape: Shape) -> float:
    """Of a parameter on the GPU: float16 is trained over float32 weights, quantised layers take few bits."""
    named = run.model.torch_dtype or shape.config.get("dtype") or shape.config.get("torch_dtype")
    if named == "float32" or (run.tuner.train_type == "full" and "float16" in (named, run.schedule.compute)):
        return 4
    layers = 1 - shape.ends / shape.parameters if run.quant.quant_method else 0
    return 2 * (1 - layers) + layers * (run.quant.quant_bits or 4) / 8 * 1.06  # with the scales of blocks


def zero_stage(text: str) -> str:
    """What slices, as it is; of a file or of JSON for --deepspeed the stage."""
    if re.fullmatch(r"none|fsdp2|zero[123](_offload)?", text):
        return text
    path = Path(text).expanduser()
    found = re.search(r'"stage"\s*:\s*([123])', path.read_text("utf-8") if path.is_file() else text)
    return f"zero{found[1] if found else 2}"


def beside(run: RlhfRun, shape: Shape, gpu_bytes: float) -> dict[str, Any]:
    """Models beside the trained one, and who gives the answers: fields of a job."""
    kind, vllm, reference = run.rlhf.rlhf_type, run.vllm, run.rlhf.needs_reference
    apart = run.tuner.train_type == "full" or bool(run.rlhf.ref_adapters)
    kept = reference and apart and not run.rlhf.precompute_ref_log_probs
    teacher = find_shape(run.rlhf.teacher_model).parameters if run.rlhf.teacher_model else 0.0
    teacher /= shape.parameters
    here = vllm.use_vllm and vllm.mode == "colocate"
    weights = here * 2 * shape.parameters / vllm.vllm_tensor_parallel_size
    share = here * gpu_bytes * (vllm.vllm_gpu_memory_utilization or BESIDE_TRAINING)
    return {
        "copies": kept + teacher,
        "trained_copies": 1 + (kind == "ppo"),
        "forwards": reference + teacher,
        "samples": kind in ANSWERS and not vllm.use_vllm,
        "vllm_bytes": max(share, weights),
        "vllm_weights": weights,
        "vllm_sleeps": vllm.sleep_level > 0,
    }


def longest_batch(run: Any, shape: Shape) -> tuple[int, int]:
    """Tokens of the longest micro-batch, and those among them that may have logits: all but prompts."""
    size, longest, kind = run.schedule.per_device_train_batch_size, row_limit(run, shape), method_of(run)
    if kind in SAMPLES:
        answer = run.online.max_completion_length
        return size * (longest + answer), size * answer
    tokens = size * longest * (1 + (kind in PAIRED))
    return tokens, tokens * (kind not in ("rm", "seq_cls", "embedding", "reranker"))


def row_limit(run: TrainRun, shape: Shape) -> int:
    """The most tokens of a row, or of a pack."""
    longest = run.template.max_length or shape.config.get("max_position_embeddings", 32768)
    return (run.data.packing_length or longest) if run.data.packing else longest


def method_of(run: Any) -> str:
    """--rlhf_type, or --task_type of supervised training."""
    return run.rlhf.rlhf_type if isinstance(run, RlhfRun) else run.task.task_type


def accumulation(run: Any, layout: Layout) -> int:
    size, count = run.schedule.per_device_train_batch_size, run.schedule.gradient_accumulation_steps
    if isinstance(run, OnMegatron):
        return micro_batches(layout, global_batch_size=run.megatron.global_batch_size, micro_batch_size=size)
    return count or (1 if method_of(run) in SAMPLES else math.ceil(ROWS_PER_STEP / size / layout.data))


def find_course(run: Any, plan: PlanRun, job: Job) -> Course:
    """Steps and tokens, by what is known of the rows."""
    limit = row_limit(run, job.shape)
    rows, length, guesses = measure_rows(run.data.dataset, plan, limit)
    size, count = run.schedule.per_device_train_batch_size, accumulation(run, job.layout)
    items, updates, sampled, answers = size * count * job.layout.data, 1, 0.0, 0
    tokens = length * items * (1 + (method_of(run) in PAIRED))
    if method_of(run) in SAMPLES:
        made, answer = run.online.plan(size, count, job.layout.data), run.online.max_completion_length
        guesses += (f"every answer has all {answer:,} tokens that it may have",)
        items, updates, length = made.prompts, made.updates, length + answer
        tokens, sampled = length * made.answers / made.parts, answer * made.answers / updates
        answers = math.ceil(made.answers / job.layout.world)
    elif run.data.packing:
        tokens = float(limit * items)
        rows = rows and math.ceil(rows * length / limit)
    steps = run.schedule.max_steps
    if steps <= 0:
        steps = rows and math.ceil(run.schedule.num_train_epochs * math.ceil(rows / items)) * updates
    return Course(steps, tokens, sampled, length, answers, guesses)


def measure_rows(
    datasets: tuple[str, ...], plan: PlanRun, limit: int
) -> tuple[int | None, float, tuple[str, ...]]:
    """How many rows there are, their mean length in tokens, and what was guessed."""
    counted, seen, size, unknown = 0, 0, 0.0, not datasets
    for name in datasets:
        place, _, amount = name.partition("#")
        path = Path(place).expanduser()
        lines, mean = sample_file(path) if path.is_file() else (0, 0.0)
        seen, size = seen + lines, size + mean * lines
        unknown = unknown or not (lines or amount)
        counted += int(amount) if amount.isdecimal() else lines
    length = min(plan.row_tokens or (size / seen / TOKEN_BYTES if seen else limit), limit)
    guess = f"every row has all {limit:,} tokens that it may have; --row_tokens says otherwise"
    if seen:
        guess = f"a row has {length:,.0f} tokens, one for {TOKEN_BYTES:g} bytes of a file"
    return plan.rows or (None if unknown else counted), length, () if plan.row_tokens else (guess,)


def sample_file(path: Path) -> tuple[int, float]:
    """Rows of a local file and their mean bytes, by its beginning where it is long."""
    with path.open("rb") as handle:
        text = handle.read(READ_BYTES)
    lines = sum(1 for line in text.splitlines() if line.strip()) or 1
    return round(lines * path.stat().st_size / max(len(text), 1)), len(text) / lines
