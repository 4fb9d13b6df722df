"""Runs in every rank of a job: steps of adapters on the Megatron engine, for test_megatron_lora.py."""

from pathlib import Path
from typing import Any

import torch
from lora_steps import OPTIM, RATE, STEPS, make_batches, make_objective
from megatron_jobs import Answers, run_each
from safetensors.torch import save_file
from transformers import AutoConfig

from swift.config.layout import Layout
from swift.config.tuner import TunerConfig
from swift.engines.megatron.bridge import Bridge
from swift.engines.megatron.checkpoint import Files
from swift.engines.megatron.engine import MegatronEngine, Wrapping
from swift.engines.megatron.lora import AdapterBridge, add_adapters, as_matrix, check_places
from swift.engines.megatron.model import build_chunks
from swift.engines.megatron.settings import model_settings
from swift.engines.megatron.setup import context_ranks, seed_model_parallel
from swift.engines.ranks import Ranks
from swift.models.outline import outline_adapters
from swift.utils.files import write_json


def run_cases(rank: int, world: int, cases: list[dict[str, Any]]) -> None:
    """The hook."""
    run_each(rank, world, cases, run_case)


def build_engine(ranks: Ranks, layout: Layout, case: dict[str, Any]) -> MegatronEngine:
    source = Path(case["model"])
    config = AutoConfig.from_pretrained(source)
    settings = model_settings(config, layout, torch.float32, **case["chosen"])
    tuner = TunerConfig(train_type="lora", adapters=(case["adapter"],), lora_dropout=case["dropout"])
    outline = outline_adapters(config, tuner, dtype=torch.float32, base=source, seed=1)
    check_places(config, outline)
    chunks = build_chunks(config, settings)
    Bridge(config, settings).load(chunks, source)
    add_adapters(chunks, config, settings, outline)
    wrapping = Wrapping(distributed_optimizer=case["sliced"], overlap_grad_reduce=case["sliced"],
                        overlap_param_gather=case["sliced"])  # fmt: skip
    return MegatronEngine(
        chunks, settings, OPTIM, vocabulary=config.vocab_size, learning_rate=RATE, total_steps=STEPS,
        ranks=ranks, context=context_ranks(case["context"]), wrapping=wrapping, files=Files(config, source),
    )  # fmt: skip


def run_case(ranks: Ranks, layout: Layout, case: dict[str, Any]) -> None:
    seed_model_parallel(1)
    engine = build_engine(ranks, layout, case)
    found: dict[str, Any] = {"rows": [], "parameters": list(engine.num_parameters)}
    answers = Answers(engine, Path(case["model"]), 1.0)
    before = answers.check()
    for step in range(STEPS):
        batches = make_batches(step)[engine.data_rank :: engine.data_world]
        sums = engine.forward_backward(batches, make_objective())
        if step == 0 and not case["sliced"]:
            gradients = AdapterBridge().export(engine.plain, value=lambda p: p.main_grad)
            kept = {name: as_matrix(tensor) for name, tensor in gradients if tensor is not None}
            if ranks.is_main:
                save_file(kept, Path(case["result"]).with_suffix(".safetensors"))
        info = engine.optim_step()
        found["rows"].append([sums.means()["loss/tokens"], info.grad_norm])
    assert answers.check() != before
    unseen = make_batches(STEPS)[engine.data_rank :: engine.data_world]
    with engine.reference():
        found["reference"] = engine.measure(unseen, make_objective()).means()["loss/tokens"]
    found["eval"] = engine.measure(unseen, make_objective()).means()["loss/tokens"]
    if ranks.rank == ranks.world - 1:
        write_json(Path(case["result"]), found)
