"""What a training step holds in the memory of one GPU, in bytes, and how fast it may be.

Owns: the formulas; tests/cli/test_plan.py holds them against the peaks and rates in benchmarks/results. Not
here: which flags make which job (plan_job.py), words (plan.py).
"""

from dataclasses import dataclass

from swift.cli.plan_shape import Shape
from swift.config.layout import Layout
from swift.config.plan import Gpu

GIB = 2**30
LIVE_PARAMETERS = 1e9  # that ZeRO-3 gathers at a time (stage3_max_live_parameters)
# Bytes of a parameter for weight, gradient, optimizer, and what that takes while it steps: first those that
# every process has, then those that all share. Masters and moments are float32; so are gradients in a step,
# beside what torch's AdamW takes. ZeRO-3 does that group by group.
ZERO = {
    "zero1": ((2, 2, 0, 0), (0, 0, 12, 8)),
    "zero2": ((2, 0, 0, 0), (0, 2, 12, 8)),
    "zero2_offload": ((2, 0, 0, 0), (0, 2, 0, 0)),
    "zero3": ((0, 0, 0, 0), (2, 2, 12, 4)),
    "zero3_offload": ((0, 0, 0, 0), (0, 2, 0, 0)),
}
# Shares of the dense bf16 peak, as measured on H200s within one node, by file of benchmarks/results.
RECOMPUTED = 6 / 8  # of the FLOPs of a step that is recomputed whole, those that count
RATES = {
    "gpu_megatron_step-h200": {
        "dense": 0.491, "tensor": 0.429, "experts": 0.219, "expert": 0.182, "fsdp2 moe": 0.106, "none": 0.32,
    },
    "gpu_sft_step-2xh200": {"lora": 0.198, "fsdp2": 0.307, "zero2": 0.277, "zero3": 0.211},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One process of a training, as far as its memory and speed go."""

    shape: Shape
    layout: Layout  # of the transformers engine: `context` is --sequence_parallel_size
    slicing: str = "none"  # none, fsdp2, zero1 ... zero3_offload, distributed (Megatron's optimizer)
    megatron: bool = False
    adapters: float = 0  # parameters of adapters, which alone are trained; 0 = all weights are
    weight_bytes: float = 2  # of a parameter
    moment_bytes: float = 4  # of the optimizer's state of one, beside a float32 master
    spare_bytes: float = 2  # of one while the optimizer steps
    logit_bytes: float = 12  # of a logit while the loss is worked out: float32, its softmax, its gradient
    tokens: int = 0  # of the longest micro-batch, all ranks that share its rows together
    trained: int = 0  # of them, positions that have logits
    micro_batches: int = 1  # in a step; gradients stay from one to the next
    recomputed: float = 1.0  # share of the layers whose forward pass is done again
    chunk: int = 1  # layers between two of the inputs that are kept then
    copies: float = 0  # frozen models beside the trained one: reference, teacher
    trained_copies: int = 1  # 2 = with a value model
    forwards: float = 0  # passes without gradient over each token
    samples: bool = False  # answers come from the model in training
    vllm_bytes: float = 0  # for vLLM on the same GPU
    vllm_weights: float = 0  # of them
    vllm_sleeps: bool = False  # while the model is trained


def find_peak(job: Job) -> tuple[str, dict[str, float]]:
    """The fullest moment of a step on the fullest GPU, in bytes by part; without CUDA's own and gaps."""
    moments = [moment for stage in range(job.layout.pipeline) for moment in moments_of(job, stage).items()]
    return max(moments, key=lambda moment: sum(moment[1].values()))


def held(job: Job, stage: int) -> list[float]:
    """Bytes of weights, of gradients, of the optimizer, and of what it takes for a moment while it steps."""
    shape, layout, world = job.shape, job.layout, job.layout.world
    first, last = stage == 0, stage == layout.pipeline - 1
    ends = shape.ends if first and last else shape.hidden * shape.vocabulary * (first or last)
    layers = layers_on(job, stage)
    dense = (ends + layers * shape.plain) / layout.tensor
    routed = layers * shape.routed / (layout.expert * layout.expert_tensor)
    slices = dense / (layout.data * layout.context) + routed / layout.expert_data
    width, states, spare = job.weight_bytes, job.moment_bytes, job.spare_bytes
    own, nothing = dense + routed, (0, 0, 0, 0)
    sliced = job.slicing in ("fsdp2", "zero3", "zero3_offload")
    frozen = width * own / (world if sliced else 1) * (job.copies + bool(job.adapters))
    buckets = 2 if world > 1 else 1  # DDP has gradients in its buckets once more
    if job.adapters:  # float32
        own = job.adapters / layout.tensor / layout.pipeline
        slices = own / world
        whole = job.slicing in ("none", "distributed")
        mine, shared = ((4, 4 * buckets, 8, 4), nothing) if whole else (nothing, (4, 4, 8, 4))
    elif job.megatron:  # gradients are float32; beside bfloat16 weights there are masters
        mine, shared = (width, 4, 0, 0), (0, 0, states + 4 * (width < 4), spare)
        slices = own if job.slicing == "none" else slices
    elif job.slicing == "fsdp2":
        mine, shared = nothing, (width, width, states, spare)
    else:
        mine, shared = ZERO.get(job.slicing, ((width, buckets * width, states, spare), nothing))
    weights, *others, brief = (a * own + b * slices for a, b in zip(mine, shared, strict=True))
    return [frozen + job.trained_copies * weights, *(job.trained_copies * part for part in others), brief]


def layers_on(job: Job, stage: int) -> float:
    return job.layout.layers[stage] if job.layout.layers else job.shape.layers / job.layout.pipeline


def moments_of(job: Job, stage: int) -> dict[str, dict[str, float]]:
    """Every moment of a step that may be the fullest.

    Of activations, the first of p stages keep those of p micro-batches (1F1B, arXiv:2104.04473).
    """
    shape, layout, width = job.shape, job.layout, max(job.weight_bytes, 2)
    weights, gradients, optimizer, spare = held(job, stage)
    tokens, share = job.tokens / layout.context, layout.tensor if layout.sequence else 1
    stream, inner = shape.kept
    layer = width * tokens * (stream / share + inner / layout.tensor)
    layers, again = layers_on(job, stage), job.recomputed * layers_on(job, stage)
    inputs = width * tokens * shape.hidden / share * again / job.chunk
    kept = (layout.pipeline - stage) * ((layers - again) * layer + inputs)
    worked = 2 * layer * (job.chunk if again else 1)  # with its gradients
    whole_ends = whole_layers = 0.0  # of sliced weights
    if job.slicing == "fsdp2":  # the ends stay whole from forward to backward; a layer, and the next one
        whole_ends = width * shape.ends
        whole_layers = whole_ends + 2 * width * (shape.plain + shape.routed)
    elif job.slicing.startswith("zero3"):
        whole_ends = whole_layers = width * min(LIVE_PARAMETERS, shape.parameters)
    logits = job.logit_bytes * job.trained / layout.context * shape.vocabulary / layout.tensor
    if stage < layout.pipeline - 1:
        logits = 0.0
    stays = gradients if job.megatron or job.micro_batches > 1 or job.adapters else 0.0
    everything = width * shape.parameters if job.samples and whole_layers else 0.0
    names = ("gradients", "activations", "logits", "whole weights", "optimizer's workspace")
    table = {
        "the loss is worked out": (stays, kept, logits, whole_ends, 0.0),
        "the backward pass begins": (stays, kept + worked, 0.0, whole_layers, 0.0),
        "the backward pass ends": (gradients, worked, 0.0, whole_layers, 0.0),
        "the optimizer steps": (gradients, 0.0, 0.0, 0.0, spare),
        "answers are sampled": (0.0, 0.0, 0.0, everything, 0.0),
    }
    always = {"weights": weights, "optimizer": optimizer, "vLLM": 0.0 if job.vllm_sleeps else job.vllm_bytes}
    found = {name: always | dict(zip(names, sizes, strict=True)) for name, sizes in table.items()}
    found["answers are sampled"]["vLLM"] = job.vllm_bytes
    return found


def find_rate(job: Job) -> tuple[float, str]:
    """The measured MFU of the job that is most like this one, and its file.

    Recomputation of Megatron's layers, and its stages that wait (arXiv:2104.04473), take their part.
    """
    layout, sparse = job.layout, bool(job.shape.routed)
    names = {
        "lora": bool(job.adapters),
        "fsdp2 moe": sparse and not job.megatron,
        job.slicing.removesuffix("_offload").replace("zero1", "zero2"): not job.megatron,
        "expert": sparse and layout.expert > 1,
        "experts": sparse,
        "tensor": layout.tensor > 1,
        "dense": True,
    }
    name = next(name for name, holds in names.items() if holds)
    file, rate = next((file, rates[name]) for file, rates in RATES.items() if name in rates)
    if job.megatron:
        rate *= 1 if job.adapters else 1 - job.recomputed * (1 - RECOMPUTED)
        rate /= 1 + (layout.pipeline - 1) / (layout.virtual or 1) / job.micro_batches
    return rate, f"benchmarks/results/{file}.jsonl"


def tokens_per_second(job: Job, teraflops: float, length: float) -> float:
    """Trained tokens of one GPU in a second, in rows of `length`; passes without gradient cost a third."""
    flops = job.shape.flops(length, full=not job.adapters) * job.trained_copies
    flops += job.forwards * job.shape.flops(length, full=True) / 3
    return find_rate(job)[0] * teraflops * 1e12 / flops


def sampling(job: Job, gpu: Gpu, *, answers: int, length: float) -> tuple[int, float]:
    """Answers of `length` at once on a GPU, and sampled tokens of the GPU in a second.

    They have room beside vLLM's weights, or in what rollout/slots.py takes of what is left. One step of all
    reads the weights once and every cache, at half of the bandwidth. Source: arXiv:2211.05102, section 2; not
    measured.
    """
    cache = job.shape.cache * length
    left = gpu.memory_gib * GIB - sum(moments_of(job, 0)["answers are sampled"].values())
    room = job.vllm_bytes - job.vllm_weights if job.vllm_bytes else 0.6 * left
    count = min(answers, max(int(room / cache), 1))
    weights = job.vllm_weights or 2 * job.shape.parameters / job.layout.tensor / job.layout.pipeline
    seconds = (weights + count * cache) / (0.5e12 * gpu.bandwidth)
    return count, count / seconds
