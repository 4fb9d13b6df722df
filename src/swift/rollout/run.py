"""`swift rollout`: a server of vLLM for a training elsewhere."""

import torch

from swift.config.runs import RolloutRun
from swift.models.hub import resolve_model
from swift.rollout.vllm import check_vllm, engine_arguments
from swift.rollout.vllm_server import check_port, serve


def run_rollout(run: RolloutRun) -> int:
    """Becomes the server; returns only through errors."""
    check_vllm("swift rollout")
    check_port(run.rollout.host, run.rollout.port)  # before anything is downloaded
    assert run.model.model is not None
    model = resolve_model(run.model.model, revision=run.model.model_revision, **run.model.hub)
    dtype = None if run.model.torch_dtype is None else getattr(torch, run.model.torch_dtype)
    arguments = engine_arguments(run.vllm, dtype=dtype)
    if run.rollout.vllm_data_parallel_size > 1:
        arguments["data_parallel_size"] = run.rollout.vllm_data_parallel_size
    serve(model, arguments, host=run.rollout.host, port=run.rollout.port)
    return 1
