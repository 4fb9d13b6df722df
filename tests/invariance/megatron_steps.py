"""Runs in every rank of a job: training steps of the Megatron engine, for test_megatron_engine.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_jobs import Answers, run_each
from safetensors.torch import load_file, save_file
from steps import OPTIM, RATE, STATS, TEMPERATURE, UNSEEN, make_batches, make_objective, take_online_steps
from transformers import AutoConfig

from swift.config.layout import Layout
from swift.config.option import ConfigError
from swift.engines.megatron.bridge import Bridge
from swift.engines.megatron.checkpoint import Files
from swift.engines.megatron.engine import MegatronEngine, Wrapping
from swift.engines.megatron.model import build_chunks
from swift.engines.megatron.settings import model_settings
from swift.engines.megatron.setup import context_ranks, seed_model_parallel
from swift.engines.offload import set_aside
from swift.engines.ranks import Ranks
from swift.utils.files import write_json


def run_cases(rank: int, world: int, cases: list[dict[str, Any]]) -> None:
    """The hook."""
    run_each(rank, world, cases, run_case)


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.main_grad if isinstance(tensor, torch.nn.Parameter) else tensor


def run_case(ranks: Ranks, layout: Layout, case: dict[str, Any]) -> None:
    seed_model_parallel(1)
    source, result = Path(case["model"]), Path(case["result"])
    config = AutoConfig.from_pretrained(source)
    settings = model_settings(config, layout, torch.float32, **case["chosen"])
    bridge, chunks = Bridge(config, settings), build_chunks(config, settings)
    bridge.load(chunks, source)
    # Slices of the optimizer have slices of the sums: whole ones are compared without.
    wrapping = Wrapping(distributed_optimizer=case["sliced"], overlap_grad_reduce=case["overlap"],
                        overlap_param_gather=case["overlap"] and case["sliced"])  # fmt: skip
    engine = MegatronEngine(
        chunks, settings, OPTIM, vocabulary=config.vocab_size, learning_rate=RATE, total_steps=case["steps"],
        ranks=ranks, context=context_ranks(case["context"]), wrapping=wrapping, files=Files(config, source),
        temperature=TEMPERATURE,
    )  # fmt: skip
    left = load_file(source / "model.safetensors")
    for name, tensor in engine.weights():  # on every rank
        assert torch.equal(tensor, left.pop(name)), name
    assert left == {}
    with pytest.raises(ConfigError, match="megatron cannot answer"), engine.generating():
        pass
    found: dict[str, Any] = {"rows": [], "parameters": list(engine.num_parameters)}
    for step in range(case["steps"]):
        batches = make_batches(step)[engine.data_rank :: engine.data_world]
        sums = engine.forward_backward(batches, make_objective())
        if step == 0 and not case["sliced"]:
            gradients = {
                name: tensor.clone()
                for name, tensor in bridge.export(engine.plain, value=gradient)
                if tensor is not None and not name.endswith("_bias")  # of experts, which no gradient moves
            }
            if ranks.is_main:
                save_file(gradients, result.with_suffix(".safetensors"))
        info = engine.optim_step()
        found["rows"].append([sums.means()["loss/tokens"], info.grad_norm])
    with set_aside(engine.movable(weights=True, moments=True)):
        pass  # all comes back
    handed = dict(engine.weights())  # before a forward pass waits for what the step has sent on its way
    unseen = make_batches(UNSEEN)[engine.data_rank :: engine.data_world]
    found["eval"] = engine.measure(unseen, make_objective()).means()["loss/tokens"]
    assert all(torch.equal(tensor, handed[name]) for name, tensor in engine.weights())
    stats = engine.forward(make_batches(UNSEEN)[:1], frozenset(STATS))
    found["stats"] = {name: getattr(stats[0], name).double().sum().item() for name in STATS}
    Answers(engine, source, TEMPERATURE).check()
    found["online"] = take_online_steps(engine)
    if ranks.rank == ranks.world - 1:  # which is not the one that speaks, in most layouts
        write_json(result, found)
