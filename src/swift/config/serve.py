"""What `swift deploy` serves, to whom, and how much of it at a time."""

import re
from dataclasses import dataclass

from swift.config.option import ConfigError, option, require_package

NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    adapters: tuple[str, ...] = option(
        (), "checkpoints with adapters: NAME=DIR is a model of its own, DIR alone changes the one served"
    )
    load_args: bool = option(True, "take model, system prompt and template from the checkpoints' args.json")
    merge_lora: bool = option(False, "fold --adapters DIR into the weights in memory: faster answers")
    infer_backend: str = option("transformers", "engine", choices=("transformers", "pt", "vllm"))
    vllm_data_parallel_size: int = option(1, "engines of vLLM behind the port", min=1)
    max_batch_size: int = option(64, "answers of one model that are computed together", unit="answers", min=1)
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 = reachable from other machines")
    port: int = option(8000, "0 = any that is free", range=(0, 65535))
    api_key: str | None = option(None, "key that requests must bring; none = everyone may ask")
    ssl_keyfile: str | None = option(None, "private key of --ssl_certfile")
    ssl_certfile: str | None = option(None, "certificate to serve https with; none = http")
    served_model_name: str | None = option(None, "what requests call the model; none = the end of --model")
    owned_by: str = option("swift", "owner that the list of models tells")
    max_logprobs: int = option(20, "most likely tokens that a request may ask for at a position", min=0)
    max_queue_size: int = option(256, "answers that may wait; no more are taken", unit="answers", min=0)
    max_body_size: int = option(16_000_000, "largest request that is read", unit="bytes", min=1)
    shutdown_timeout: float = option(30.0, "how long answers may go on after SIGTERM", unit="seconds", min=0)
    log_interval: float = option(20.0, "time between lines on the load; 0 or less = none", unit="seconds")
    result_path: str | None = option(None, "JSONL of what was asked and answered; none = not kept")
    verbose: bool = option(False, "a line for each request")
    log_level: str = option(
        "info", "least important lines that are shown; debug, trace = those of uvicorn too",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    )  # fmt: skip

    @property
    def named_adapters(self) -> dict[str | None, str]:
        """Directory by name; that of None changes the model itself."""
        matches = [(NAMED.fullmatch(text), text) for text in self.adapters]
        return {match.group(1) if match else None: match.group(2) if match else t for match, t in matches}

    def check(self) -> None:
        if self.vllm_data_parallel_size > 1 and self.infer_backend != "vllm":
            raise ConfigError("--vllm_data_parallel_size has no effect without --infer_backend vllm")
        for package in ("fastapi", "uvicorn", "llguidance") if self.infer_backend != "vllm" else ():
            require_package(package, flag="swift deploy", install="swiftune[serve]")
        names = self.named_adapters
        if len(names) < len(self.adapters) or (None in names and len(names) > 1):
            raise ConfigError(
                f"--adapters {' '.join(self.adapters)}: several need a name each",
                hint="--adapters first=DIR second=DIR",
            )
        if self.merge_lora and names.keys() != {None}:
            raise ConfigError(
                "--merge_lora takes one checkpoint without a name", hint="--adapters DIR, not NAME=DIR"
            )
        if self.served_model_name in names and self.served_model_name is not None:
            raise ConfigError(
                f"--served_model_name {self.served_model_name} is also a name in --adapters",
                hint="give each another name",
            )
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            given, other = ("key", "cert") if self.ssl_keyfile else ("cert", "key")
            raise ConfigError(f"--ssl_{given}file needs --ssl_{other}file", hint="https takes both")
