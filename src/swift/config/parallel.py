"""How a training run is spread over processes."""

from dataclasses import dataclass

from swift.config.option import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    fsdp: str | None = option(
        None,
        help="slice weights, gradients and optimizer over the processes (FSDP2); none = a copy on each (DDP)",
        choices=("fsdp2", "full_shard"),
    )
    ddp_timeout: int = option(
        1800, help="longest wait of one process for the others", unit="seconds", range=(1, None)
    )
