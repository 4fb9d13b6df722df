"""How a training run is spread over processes."""

from dataclasses import dataclass

from swift.config.option import Clash, option, refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    fsdp: str | None = option(
        None,
        "slice weights, gradients and optimizer over the processes (FSDP2); none = a copy on each (DDP)",
        choices=("fsdp2", "full_shard"),
    )
    deepspeed: str | None = option(
        None, "train through DeepSpeed: zero0 to zero3, zero2_offload, zero3_offload, or a JSON file or text"
    )
    sequence_parallel_size: int = option(1, "processes that share a row (Ulysses): for long rows", min=1)
    ddp_backend: str | None = option(
        None, "exchanges between GPUs; none = nccl (without GPUs: gloo)", choices=("nccl", "gloo")
    )
    ddp_find_unused_parameters: bool = option(
        False, "let DDP look for weights that a step did not use: slower, for models that skip some"
    )
    ddp_bucket_cap_mb: int | None = option(None, "sent by DDP at once; none = torch's 25", unit="MiB", min=1)
    ddp_timeout: int = option(1800, "longest wait of one process for the others", unit="seconds", min=1)

    @property
    def zero(self) -> str | None:
        """--deepspeed where it has something to do: stage 0 slices nothing, which is what DDP does."""
        return None if self.deepspeed == "zero0" else self.deepspeed

    @property
    def slicer(self) -> str | None:
        """The flag that slices weights or optimizer over the processes, if one does."""
        if self.zero:
            return f"--deepspeed {self.deepspeed}"
        return "--fsdp" if self.fsdp else None

    def check(self) -> None:
        if self.fsdp and self.deepspeed:
            raise Clash("--fsdp and --deepspeed both slice the model")
        if self.fsdp or self.deepspeed:
            names = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb")
            other = f"with --{'fsdp' if self.fsdp else 'deepspeed'}"
            refuse(self, names, other, hint="leave one of them out")
