"""Training throughput of the transformers engine on one GPU, random weights of a true shape.

    python benchmarks/gpu_sft_step.py --shape qwen3-8b --tokens 8192 --tuner lora
    torchrun --standalone --nproc_per_node 2 benchmarks/gpu_sft_step.py --tuner full --fsdp --layouts flat

Rows have lognormal lengths; one flat micro-batch of --tokens tokens a process is a step. Prints one JSON line
a layout: tokens/s (real tokens, padding not counted), MFU and peak memory. MFU counts 6 FLOPs a parameter and
token for full training, 4 for LoRA (no gradients of frozen weights), plus attention, over the card's dense
bf16 peak; recomputation is not counted as useful.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from swift.config.optim import OptimConfig
from swift.config.parallel import ParallelConfig
from swift.config.tuner import TunerConfig
from swift.data.collate import collate
from swift.engines.attention import FLAT_ATTENTION
from swift.engines.ranks import Ranks, join_ranks, leave_ranks
from swift.engines.transformers.engine import TransformersEngine
from swift.engines.transformers.wrap import Wrapper, load_zero, wrap
from swift.models.adapters import add_lora
from swift.objectives.sft import Sft
from swift.template.tokenize import Encoded

SHAPES = {
    "qwen3-8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


def make_rows(tokens: int, vocabulary: int, seed: int) -> list[Encoded]:
    """Rows of lognormal length (median 400 tokens), `tokens` tokens together; 70 % are trained."""
    random = np.random.RandomState(seed)
    rows = []
    while tokens > 0:
        length = int(min(tokens, max(16, random.lognormal(6.0, 0.9))))
        ids = random.randint(3, vocabulary, length).astype(np.int32)
        labels = np.where(np.arange(length) < 0.3 * length, -100, ids).astype(np.int32)
        rows.append(Encoded(ids, labels, None))
        tokens -= length
    return rows


def make_config(shape: dict) -> PretrainedConfig:
    """Of a Qwen3, with experts where the shape has them."""
    kind = Qwen3MoeConfig if "num_experts" in shape else Qwen3Config
    return kind(**shape, max_position_embeddings=40960)


def useful_flops(shape: dict, rows: list[Encoded], full: bool = True) -> float:
    """Of one step over `rows`: active parameters, attention, and the head where a token is trained."""
    hidden, heads, width = shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]
    projections = hidden * width * (2 * heads + 2 * shape["num_key_value_heads"])
    active = shape.get("num_experts_per_tok", 1) * shape.get(
        "moe_intermediate_size", shape["intermediate_size"]
    )
    layers, factor = shape["num_hidden_layers"], 6 if full else 4
    tokens = sum(len(row.input_ids) for row in rows)
    trained = sum(int((row.labels != -100).sum()) for row in rows)
    attention = 6 * layers * heads * width * sum(len(row.input_ids) ** 2 for row in rows)
    body = layers * (projections + 3 * hidden * active)
    return factor * (body * tokens + hidden * shape["vocab_size"] * trained) + attention


def memory_gib(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None


def choose_wrapper(options: argparse.Namespace, ranks: Ranks, width: int) -> Wrapper:
    if not options.zero:
        return partial(wrap, parallel=ParallelConfig(fsdp="fsdp2" if options.fsdp else None))
    zero = load_zero()
    config = zero.settle(
        options.zero, micro_batch=1, accumulation=1, data_world=ranks.world, clip=OptimConfig().max_grad_norm,
        compute="bfloat16", width=width,
    )  # fmt: skip
    return partial(zero.wrap_zero, config=config)


def print_profile(engine: TransformersEngine, rows: list[Encoded], path: str) -> None:
    """One step under torch's profiler."""
    with torch.profiler.profile() as profile:
        engine.forward_backward([collate(rows)], Sft())
        engine.optim_step()
    profile.export_chrome_trace(path)
    print(
        profile.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tuner", choices=("lora", "full"), default="lora")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layouts", nargs="+", default=["flat", "flat-sdpa-mask", "padded"])
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--compile", action="store_true", help="--torch_compile true")
    parser.add_argument("--zero", help="zero1, zero2, zero3 or an offloading one of them, through DeepSpeed")
    parser.add_argument("--dropout", type=float, default=TunerConfig().lora_dropout)
    parser.add_argument(
        "--profile", help="write a Chrome trace of one step here, and print the longest kernels"
    )
    parser.add_argument("--layers", type=int, help="of the model; none = all")
    options = parser.parse_args()
    shape = dict(SHAPES[options.shape])
    shape["num_hidden_layers"] = options.layers or shape["num_hidden_layers"]
    ranks, device = join_ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 600)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(make_config(shape), dtype=torch.bfloat16)
    if options.tuner == "lora":
        model = add_lora(model, TunerConfig(lora_dropout=options.dropout), seed=0)
    engine = TransformersEngine(
        model,
        OptimConfig(),
        learning_rate=1e-5,
        total_steps=100,
        gradient_checkpointing=True,
        compiler="inductor" if options.compile else None,
        ranks=ranks,
        wrapper=choose_wrapper(options, ranks, shape["hidden_size"]),
    )
    base = model.get_base_model() if options.tuner == "lora" else model
    rows = make_rows(options.tokens, shape["vocab_size"], ranks.rank)
    flops = useful_flops(shape, rows, options.tuner == "full")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((v for k, v in PEAK_FLOPS.items() if k in name), float("nan"))
    for layout in options.layouts:
        engine.layout = replace(engine.layout, flat=layout != "padded", own_attention=layout == "flat")
        base.set_attn_implementation(FLAT_ATTENTION if layout == "flat" else "sdpa")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(options.steps):
            started = time.perf_counter()
            engine.forward_backward([collate(rows)], Sft())
            engine.optim_step()  # reads the gradient norm, so it waits for the device
            seconds.append(time.perf_counter() - started)
        best = sorted(seconds[2:])[len(seconds[2:]) // 2] if len(seconds) > 2 else seconds[-1]
        result = {
            "device": name,
            "shape": options.shape,
            "processes": ranks.world,
            "tuner": options.tuner
            + ("-fsdp2" if options.fsdp else f"-{options.zero}" if options.zero else ""),
            "layout": layout + ("-compiled" if options.compile else ""),
            "rows": len(rows),
            "tokens": options.tokens,
            "seconds": round(best, 4),
            "tokens_per_second_per_device": round(options.tokens / best),
            "mfu": round(flops / best / peak, 4),
            "memory_gib": memory_gib(device),
        }
        if ranks.is_main:
            print(json.dumps(result), flush=True)
            if options.profile:
                print_profile(engine, rows, options.profile)
    leave_ranks()


if __name__ == "__main__":
    main()
