"""`swift deploy --infer_backend vllm`: vLLM's own server behind the same flags; this process becomes it."""

import os
import sys
from typing import Any

import torch

from swift.config.option import ConfigError, changed
from swift.config.runs import DeployRun
from swift.infer.server_models import Plan, make_plan
from swift.infer.vllm_engine import lora_rank
from swift.models.adapters import TAKEN
from swift.rollout.vllm import check_vllm, engine_arguments
from swift.rollout.vllm_server import check_port, command_line
from swift.utils import env
from swift.utils.log import say

OURS = (  # flags of a server that vLLM's own does not know
    "max_batch_size", "result_path", "verbose", "max_queue_size", "max_body_size", "log_interval",
    "merge_lora", "owned_by", "shutdown_timeout",
)  # fmt: skip
HINTS = {
    "max_batch_size": "--vllm_max_num_seqs",
    "max_length": "--vllm_max_model_len",
    "quant_method": "--vllm_quantization",
    "merge_lora": "swift export --merge_lora true, then serve the result",
} | dict.fromkeys(TAKEN["template"], "each request says it; a checkpoint's are left with --load_args false")


def serve_through_vllm(run: DeployRun) -> int:
    """Does not return, but for errors; everything that can be wrong is found before."""
    check_vllm("--infer_backend vllm")
    options = run.serve
    check_port(options.host, options.port)
    plan = make_plan(run)
    command = build_command(plan)
    env.set_defaults({"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"})
    if options.api_key:
        env.put({"VLLM_API_KEY": options.api_key})  # not on a command line, which everyone can read
    say(f"vLLM serves {', '.join(s.name for s in plan.sources)} on {options.host}:{options.port}")
    sys.stdout.flush()
    os.execv(command[0], command)


def build_command(plan: Plan) -> list[str]:
    """vLLM's command line. Raises ConfigError for a flag that it has no word for."""
    run, options = plan.run, plan.run.serve
    check_known(plan)
    adapters = [source for source in plan.sources if source.adapter is not None]
    name = plan.sources[0].name
    dtype = None if run.model.torch_dtype is None else getattr(torch, run.model.torch_dtype)
    arguments: dict[str, Any] = {
        "model": str(plan.model), "host": options.host, "port": options.port, "seed": run.generation.seed,
        # A request for an adapter must not find the model without it under the same name.
        "served_model_name": name if plan.sources[0].adapter is None else f"{name}-base",
        "max_logprobs": options.max_logprobs, "logprobs_mode": "processed_logprobs",
        **engine_arguments(run.vllm, dtype=dtype),
    }  # fmt: skip
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    sampling = {n: getattr(run.generation, n) for n in names if getattr(run.generation, n) is not None}
    if sampling:
        arguments["override_generation_config"] = sampling
    if options.log_level != "info":
        arguments["uvicorn_log_level"] = options.log_level
    if options.vllm_data_parallel_size > 1:
        arguments["data_parallel_size"] = options.vllm_data_parallel_size
    for flag in ("ssl_keyfile", "ssl_certfile"):
        if getattr(options, flag):
            arguments[flag] = getattr(options, flag)
    if not adapters:
        return command_line(arguments)
    room = max(lora_rank(source.adapter) for source in adapters if source.adapter)
    arguments |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": room}
    return [*command_line(arguments), "--lora-modules", *(f"{s.name}={s.adapter}" for s in adapters)]


def check_known(plan: Plan) -> None:
    """Raises ConfigError for settings that vLLM's server has no word for, typed or of a checkpoint."""
    run = plan.run
    for group, names in (
        (run.serve, OURS),
        (run.generation, ("stop_words",)),
        (run.quant, ("quant_method",)),
        (run.template, ("max_length",)),
        *((source.template, TAKEN["template"]) for source in plan.sources),
    ):
        for name in names:
            if name in changed(group):
                raise ConfigError(
                    f"--{name} {getattr(group, name)} has no effect with --infer_backend vllm",
                    hint=HINTS.get(name, "leave it out, or use --infer_backend transformers"),
                )
