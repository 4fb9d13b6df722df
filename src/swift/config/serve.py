"""What `swift deploy` serves, to whom, and how much of it at a time."""

import re
from dataclasses import dataclass

from swift.config.option import ConfigError, option, require_package

NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    adapters: tuple[str, ...] = option(
        (), help="checkpoints with adapters: NAME=DIR is a model of its own, DIR alone changes the one served"
    )
    load_args: bool = option(
        True, help="take model, system prompt and template from the checkpoints' args.json"
    )
    merge_lora: bool = option(False, help="fold --adapters DIR into the weights in memory: faster answers")
    infer_backend: str = option("transformers", help="engine", choices=("transformers", "pt", "vllm"))
    vllm_data_parallel_size: int = option(1, help="engines of vLLM behind the port", range=(1, None))
    max_batch_size: int = option(
        64, help="answers of one model that are computed together", unit="answers", range=(1, None)
    )
    host: str = option("127.0.0.1", help="address to listen at; 0.0.0.0 = reachable from other machines")
    port: int = option(8000, help="0 = any that is free", range=(0, 65535))
    api_key: str | None = option(None, help="key that requests must bring; none = everyone may ask")
    ssl_keyfile: str | None = option(None, help="private key of --ssl_certfile")
    ssl_certfile: str | None = option(None, help="certificate to serve https with; none = http")
    served_model_name: str | None = option(
        None, help="what requests call the model; none = the last part of --model"
    )
    owned_by: str = option("swift", help="owner that the list of models tells")
    max_logprobs: int = option(
        20, help="most likely tokens that a request may ask for at a position", range=(0, None)
    )
    max_queue_size: int = option(
        256, help="answers that may wait; a request beyond that is refused", unit="answers", range=(0, None)
    )
    max_body_size: int = option(
        16_000_000, help="largest request that is read", unit="bytes", range=(1, None)
    )
    shutdown_timeout: float = option(
        30.0, help="how long answers may go on after Ctrl-C or SIGTERM", unit="seconds", range=(0, None)
    )
    log_interval: float = option(
        20.0, help="time between lines on requests and tokens; 0 or less = none", unit="seconds"
    )
    result_path: str | None = option(None, help="JSONL of what was asked and answered; none = not kept")
    verbose: bool = option(False, help="a line for each request")
    log_level: str = option(
        "info", help="least important lines that are shown; debug, trace = those of uvicorn too",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    )  # fmt: skip

    @property
    def named_adapters(self) -> dict[str | None, str]:
        """Directory by name; that of None changes the model itself."""
        matches = [(NAMED.fullmatch(text), text) for text in self.adapters]
        return {match.group(1) if match else None: match.group(2) if match else t for match, t in matches}

    def check(self) -> None:
        """Raises ConfigError where flags contradict each other, or a package is missing."""
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
