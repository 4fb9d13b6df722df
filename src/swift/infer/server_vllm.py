"""`swift deploy --infer_backend vllm`: vLLM's own server behind the same flags; this process becomes it."""

import os
import sys
from typing import Any

import torch

from swift.config.option import ConfigError
from swift.config.runs import DeployRun
from swift.infer.server_models import make_plan
from swift.rollout.vllm import check_vllm, engine_arguments
from swift.rollout.vllm_server import check_port, command_line
from swift.utils import env
from swift.utils.log import say

OURS = ("result_path", "verbose", "max_queue_size", "max_body_size", "log_interval")  # vLLM has its own


def serve_through_vllm(run: DeployRun) -> int:
    """Does not return, but for errors; everything that can be wrong is found before."""
    check_vllm("--infer_backend vllm")
    options = run.serve
    for name in OURS:
        if getattr(options, name) != type(options).__dataclass_fields__[name].default:
            raise ConfigError(
                f"--{name} has no effect with --infer_backend vllm, whose server is its own",
                hint="leave it out, or use --infer_backend transformers",
            )
    check_port(options.host, options.port)
    plan = make_plan(run)
    dtype = None if plan.run.model.torch_dtype is None else getattr(torch, plan.run.model.torch_dtype)
    arguments: dict[str, Any] = {
        "model": str(plan.model), "host": options.host, "port": options.port,
        "served_model_name": plan.sources[0].name, "max_logprobs": options.max_logprobs,
        **engine_arguments(run.vllm, dtype=dtype),
    }  # fmt: skip
    if options.vllm_data_parallel_size > 1:
        arguments["data_parallel_size"] = options.vllm_data_parallel_size
    for name in ("ssl_keyfile", "ssl_certfile"):
        if getattr(options, name):
            arguments[name] = getattr(options, name)
    adapters = [source for source in plan.sources if source.adapter is not None]
    command = command_line(arguments)
    if adapters:
        command += ["--enable-lora", "--lora-modules", *(f"{s.name}={s.adapter}" for s in adapters)]
    env.set_defaults({"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"})
    if options.api_key:
        env.put({"VLLM_API_KEY": options.api_key})  # not on a command line, which everyone can read
    say(f"vLLM serves {', '.join(s.name for s in plan.sources)} on {options.host}:{options.port}")
    sys.stdout.flush()
    os.execv(command[0], command)
