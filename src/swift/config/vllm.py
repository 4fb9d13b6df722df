"""vLLM: how its engine is set up, and where the one that answers for a training runs.

A field `vllm_NAME` without a meaning of ours is vLLM's own argument NAME. Not here: its package (rollout/).
"""

from dataclasses import dataclass, fields
from typing import Any

from swift.config.model import ModelConfig
from swift.config.option import ConfigError, changed, default_of, option, refuse

OURS = ("vllm_engine_kwargs", "vllm_gpu_memory_utilization")
DIFFERS = ("vllm_disable_custom_all_reduce",)  # whose default is not vLLM's
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmConfig:
    """One engine of vLLM, wherever it runs."""

    vllm_gpu_memory_utilization: float | None = option(
        None, "share of a GPU's memory; none = 0.9, beside a training 0.4", range=(0.01, 1)
    )
    vllm_tensor_parallel_size: int = option(1, "GPUs that share every layer", min=1)
    vllm_pipeline_parallel_size: int = option(1, "GPUs that each hold some layers", min=1)
    vllm_enable_expert_parallel: bool = option(False, "spread experts instead of cutting each")
    vllm_max_num_seqs: int | None = option(None, "answers under way at once; none = vLLM's choice", min=1)
    vllm_max_model_len: int | None = option(
        None,
        "longest prompt with its answer; none = the model's context",
        unit="tokens",
        min=1,
    )
    vllm_disable_custom_all_reduce: bool = option(True, "exchange between GPUs through NCCL alone")
    vllm_enforce_eager: bool = option(False, "no compiled graphs: starts faster, answers slower")
    vllm_enable_prefix_caching: bool = option(True, "compute what prompts have in common once")
    vllm_disable_cascade_attn: bool = option(False, "no shared attention over a common prefix")
    vllm_quantization: str | None = option(None, "how weights are quantised; none = as config.json says")
    vllm_speculative_config: dict[str, Any] = option({}, "speculative decoding, as JSON")
    vllm_limit_mm_per_prompt: dict[str, Any] = option({}, "images, videos ... of a prompt, as JSON")
    vllm_mm_processor_cache_gb: float | None = option(
        None, "cache of processed images; none = vLLM's choice", unit="GiB", min=0
    )
    vllm_engine_kwargs: dict[str, Any] = option({}, "any other argument of vLLM's engine, as JSON")

    def engine_arguments(self) -> dict[str, Any]:
        """What differs from vLLM's defaults, under its own names; `vllm_engine_kwargs` wins."""
        chosen = {
            field.name.removeprefix("vllm_"): getattr(self, field.name)
            for field in fields(VllmConfig)
            if field.name not in OURS
            and (field.name in DIFFERS or getattr(self, field.name) != default_of(field))
        }
        return chosen | self.vllm_engine_kwargs

    def check_unused(self, needed: str) -> None:
        """Raises ConfigError for a flag of vLLM's without `needed`, which asks for it."""
        refuse(self, changed(self), f"without {needed}", hint="add it, or leave it out")


def check_chosen_by_vllm(model: ModelConfig, where: str) -> None:
    """ConfigError for flags of a model that vLLM is not asked about."""
    for name, hint in (("attn_impl", "--vllm_engine_kwargs has its own"), ("device", "CUDA_VISIBLE_DEVICES")):
        if getattr(model, name):
            raise ConfigError(f"--{name} has no effect on {where}: vLLM chooses it", hint=hint)


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmRolloutConfig(VllmConfig):
    """vLLM as what answers while a model is trained."""

    use_vllm: bool = option(False, "vLLM gives the answers instead of the trained model's own decoder")
    vllm_mode: str | None = option(
        None,
        "colocate: in the training processes; server: `swift rollout` elsewhere; "
        "none = server where one is named",
        choices=("colocate", "server"),
    )
    vllm_device: str | None = option(
        None, "auto: a server on the GPUs beyond NPROC_PER_NODE, where there are any", choices=("auto",)
    )
    vllm_server_base_url: tuple[str, ...] = option((), "servers as http://HOST:PORT, instead of two flags")
    vllm_server_host: tuple[str, ...] = option((), "hosts of `swift rollout`")
    vllm_server_port: tuple[int, ...] = option((8000,), "port of each server")
    vllm_server_timeout: float = option(
        240.0,
        "longest wait for a server to start, and for a sign of life from it",
        unit="s",
        min=1,
    )
    vllm_server_group_port: int = option(
        0,
        "port of this host from which servers on other hosts fetch weights; 0 = any free one",
        range=(0, 65535),
    )
    sleep_level: int = option(
        0, "colocated vLLM frees while training: 0 nothing, 1 its cache (weights go to the host), 2 all",
        choices=(0, 1, 2),
    )  # fmt: skip

    @property
    def mode(self) -> str:
        """colocate or server; a named server is meant to be used."""
        named = self.vllm_server_host or self.vllm_server_base_url
        return self.vllm_mode or ("server" if named else "colocate")

    @property
    def servers(self) -> tuple[str, ...]:
        """http://HOST:PORT of every server."""
        if self.vllm_server_base_url:
            return tuple(url.rstrip("/") for url in self.vllm_server_base_url)
        ports = self.vllm_server_port
        if len(ports) == 1:
            ports *= len(self.vllm_server_host)
        pairs = zip(self.vllm_server_host, ports, strict=True)
        return tuple(f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in pairs)

    def check_rollout(self) -> None:
        """Raises ConfigError where flags contradict each other or one is missing."""
        if not self.use_vllm:
            self.check_unused("--use_vllm true")
            return
        if self.mode == "colocate":
            named = ("vllm_server_base_url", "vllm_server_host")
            refuse(self, named, "with --vllm_mode colocate", hint="leave one out")
            return
        self._check_servers()

    def check_ahead(self, *, has_turns: bool) -> None:
        """Raises ConfigError where nobody can answer beside the training (--async_generate)."""
        if not (self.use_vllm and self.mode == "server"):
            raise ConfigError(
                "--async_generate true needs --vllm_mode server: others answer with the weights in training",
                hint="start swift rollout, then --use_vllm true --vllm_server_host 127.0.0.1",
            )
        if has_turns:
            raise ConfigError(
                "--async_generate true does not go with conversations of several turns",
                hint="leave out --multi_turn_scheduler and --use_gym_env, or --async_generate",
            )

    def _check_servers(self) -> None:
        own = "on a server: it has GPUs of its own"
        refuse(self, ("sleep_level",), own, hint="leave it out")
        if self.vllm_device:
            raise ConfigError("--vllm_device auto starts its own server", hint="leave --vllm_mode out")
        if self.vllm_server_base_url and self.vllm_server_host:
            raise ConfigError("--vllm_server_base_url and --vllm_server_host name servers twice")
        for url in self.vllm_server_base_url:
            if not url.startswith("http://"):
                raise ConfigError(f"--vllm_server_base_url {url} is no http://HOST:PORT")
        hosts, ports = len(self.vllm_server_host), len(self.vllm_server_port)
        if not hosts and not self.vllm_server_base_url:
            raise ConfigError(
                "--vllm_mode server needs a server",
                hint="start one with swift rollout, then name it: --vllm_server_host 127.0.0.1",
            )
        if ports not in (1, hosts) and hosts:
            raise ConfigError(
                f"--vllm_server_port names {ports} ports for {hosts} hosts", hint="one for each"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutOptions:
    """`swift rollout`: where it listens."""

    host: str = option("127.0.0.1", "address to listen on; beyond loopback whoever can reach it is let in")
    port: int = option(8000, "port to listen on", range=(1, 65535))
    vllm_data_parallel_size: int = option(1, "engines behind the port", min=1)
