"""Runs in every rank of a job: the Megatron engine with heads, for test_megatron_heads.py."""

from pathlib import Path
from typing import Any

import torch
from head_steps import OPTIM, RATE, STEPS, TASKS, make_batches
from megatron_jobs import run_each
from safetensors.torch import save_file
from transformers import AutoConfig

from swift.config.layout import Layout
from swift.engines.megatron.bridge import Bridge
from swift.engines.megatron.dist_checkpoint import load_model, save_model
from swift.engines.megatron.engine import MegatronEngine, Wrapping
from swift.engines.megatron.model import build_chunks
from swift.engines.megatron.settings import model_settings
from swift.engines.megatron.setup import context_ranks, seed_model_parallel
from swift.engines.ranks import Ranks
from swift.utils.files import write_json


def run_cases(rank: int, world: int, cases: list[dict[str, Any]]) -> None:
    """The hook."""
    run_each(rank, world, cases, run_case)


def run_case(ranks: Ranks, layout: Layout, case: dict[str, Any]) -> None:
    seed_model_parallel(1)
    source, result, task = Path(case["model"]), Path(case["result"]), TASKS[case["task"]]
    config = AutoConfig.from_pretrained(source)
    settings = model_settings(config, layout, torch.float32, head=task.head)
    bridge, chunks = Bridge(config, settings), build_chunks(config, settings)
    bridge.load(chunks, source)
    engine = MegatronEngine(
        chunks, settings, OPTIM, vocabulary=config.vocab_size, learning_rate=RATE, total_steps=STEPS,
        ranks=ranks, context=context_ranks("all_gather"), verdict=task.verdict,
        wrapping=Wrapping(overlap_grad_reduce=case["overlap"], overlap_param_gather=case["overlap"]),
    )  # fmt: skip
    found: dict[str, Any] = {"rows": []}
    for step in range(STEPS):
        sums = engine.forward_backward(make_batches(step, engine), task.objective)
        found["rows"].append([sums.means()[f"loss/{task.unit}"], engine.optim_step().grad_norm])
    found["eval"] = engine.measure(make_batches(STEPS, engine), task.objective).means()[f"loss/{task.unit}"]
    stats = engine.forward(make_batches(STEPS, engine)[:1], task.objective.needs)[0]
    found["stats"] = [getattr(stats, name).double().sum().item() for name in sorted(task.objective.needs)]
    save_model(engine.plain, result.with_suffix(""))
    again = build_chunks(config, settings)
    load_model(again, result.with_suffix("") / "iter_0000001")
    weights = {name: tensor for name, tensor in bridge.export(again) if tensor is not None}
    if ranks.is_main:
        save_file(weights, result.with_suffix(".safetensors"))
    if ranks.rank == ranks.world - 1:
        write_json(result, found)
