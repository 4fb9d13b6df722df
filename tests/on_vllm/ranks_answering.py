"""Runs in both ranks of a job under torchrun: one vLLM over two processes that train too, by FSDP2."""

import sys
from functools import partial
from pathlib import Path

import torch
from test_rollout import END, LONG, SETTINGS, SHORT, load, worst

from swift.config.optim import OptimConfig
from swift.config.parallel import ParallelConfig
from swift.config.vllm import VllmRolloutConfig
from swift.engines.ranks import join_ranks, leave_ranks
from swift.engines.transformers.engine import TransformersEngine
from swift.engines.transformers.wrap import wrap
from swift.models.load import load_tokenizer
from swift.rollout.types import Request, Sampling
from swift.rollout.vllm import start_rollout


def answer(directory: Path) -> None:
    """Rank 0 has one request, rank 1 two; afterwards only one of them has any."""
    ranks, _ = join_ranks(torch.device("cpu"), 900)
    config = VllmRolloutConfig(use_vllm=True, vllm_tensor_parallel_size=2, **SETTINGS)
    terms = {"tokenizer": load_tokenizer(directory), "stop_token_ids": [END], "ranks": ranks}
    rollout = start_rollout(config, directory, dtype=torch.float32, **terms)
    mine = [Request(LONG, Sampling(12, seed=5), count=3)]
    if ranks.rank:
        mine = [Request(SHORT, Sampling(12, seed=6), count=2), Request(LONG, Sampling(5, seed=7))]
    assert worst(load(directory), mine, rollout.generate(mine)) < 1e-4
    trained, whole = load(directory), load(directory)
    for model in (trained, whole):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapper = partial(wrap, parallel=ParallelConfig(fsdp="fsdp2"))
    engine = TransformersEngine(
        trained, OptimConfig(), learning_rate=0.0, total_steps=1, ranks=ranks, wrapper=wrapper
    )
    rollout.update_weights(engine.weights(), version=1)
    assert worst(whole, mine, rollout.generate(mine)) < 1e-4
    assert rollout.generate(mine if ranks.is_main else []) is not None
    rollout.close()
    leave_ranks()
    print(f"rank {ranks.rank} is done", flush=True)


if __name__ == "__main__":
    answer(Path(sys.argv[1]))
