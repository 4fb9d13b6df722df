"""Training throughput of the Megatron engine on GPUs, random weights of a true shape, full parameters.

    python benchmarks/gpu_megatron_step.py --layers 8
    torchrun --standalone --nproc_per_node 2 benchmarks/gpu_megatron_step.py --tensor 2 --sequence
    torchrun --standalone --nproc_per_node 2 benchmarks/gpu_megatron_step.py \
        --shape qwen3-30b-a3b --layers 8 --expert 2

A step is --micro-batches packs of --tokens tokens on each data rank. Prints one JSON line: tokens/s of one
GPU, MFU and peak memory. MFU counts 6 FLOPs for each active parameter and token, plus attention (causal:
half), over the card's dense bf16 peak; recomputation is not counted as useful.
"""

import argparse
import json
import time

import torch
from gpu_sft_step import PEAK_FLOPS, SHAPES, make_config, make_rows, useful_flops

from swift.batch import Batch
from swift.config.layout import Layout
from swift.config.optim import OptimConfig
from swift.data.collate import collate
from swift.engines.megatron.engine import MegatronEngine, Wrapping
from swift.engines.megatron.model import build_chunks
from swift.engines.megatron.settings import model_settings
from swift.engines.megatron.setup import context_ranks, join_model_parallel, seed_model_parallel
from swift.engines.ranks import join_ranks, leave_ranks
from swift.objectives.sft import Sft


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="of the model; none = all")
    parser.add_argument("--tokens", type=int, default=8192, help="in a pack")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    for name in ("tensor", "pipeline", "context", "expert"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="of every layer")
    parser.add_argument("--overlap", action="store_true", help="gradients and parameters with the passes")
    parser.add_argument("--profile", action="store_true", help="print the longest kernels of one step")
    options = parser.parse_args()
    shape = dict(SHAPES[options.shape])
    shape["num_hidden_layers"] = options.layers or shape["num_hidden_layers"]
    config = make_config(shape)
    ranks, _ = join_ranks(torch.device("cuda"), 600)
    layout = Layout(
        world=ranks.world, tensor=options.tensor, pipeline=options.pipeline, context=options.context,
        expert=options.expert, sequence=options.sequence,
    )  # fmt: skip
    ranks = join_model_parallel(ranks, layout, 600)
    seed_model_parallel(0)
    whole = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    settings = model_settings(config, layout, torch.bfloat16, **(whole if options.recompute else {}))
    chunks = build_chunks(config, settings)
    with torch.no_grad():
        for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
            if "norm" not in name:
                parameter.normal_(0, 0.02)
    engine = MegatronEngine(
        chunks, settings, OptimConfig(), vocabulary=config.vocab_size, learning_rate=1e-5, total_steps=100,
        ranks=ranks, context=context_ranks("all_gather"),
        wrapping=Wrapping(True, options.overlap, options.overlap),
    )  # fmt: skip
    rows = [
        make_rows(options.tokens, config.vocab_size, 1000 * engine.data_rank + i)
        for i in range(options.micro_batches)
    ]
    batches = [collate(pack) for pack in rows]
    run(engine, batches)
    run(engine, batches)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    losses = [run(engine, batches) for _ in range(options.steps)]
    seconds = (time.perf_counter() - started) / options.steps
    share = engine.data_world / ranks.world
    name = torch.cuda.get_device_name()
    peak = next((v for k, v in PEAK_FLOPS.items() if k in name), float("nan"))
    flops = sum(useful_flops(shape, pack) for pack in rows) * share
    if ranks.is_main:
        degrees = {k: v for k, v in vars(options).items() if v != parser.get_default(k)}
        print(json.dumps({
            "engine": "megatron", **degrees, "gpus": ranks.world, "device": name,
            "parameters": engine.num_parameters[1], "step_ms": round(1e3 * seconds, 1),
            "tokens_per_second_per_gpu": round(sum(b.num_tokens for b in batches) * share / seconds),
            "mfu": round(flops / seconds / peak, 3), "loss": round(losses[-1], 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        }))  # fmt: skip
    if options.profile:
        with torch.profiler.profile() as profile:
            run(engine, batches)
        if ranks.is_main:
            averages = profile.key_averages()
            print(averages.table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=70))
    leave_ranks()


def run(engine: MegatronEngine, batches: list[Batch]) -> float:
    """One step; its loss. Reads the gradient norm, so it waits for the device."""
    sums = engine.forward_backward(batches, Sft())
    engine.optim_step()
    return sums.means()["loss/tokens"]


if __name__ == "__main__":
    main()
