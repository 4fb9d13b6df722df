"""`swift plan`: the GPUs and rows that a training command is planned for."""

from dataclasses import dataclass

from swift.config.option import ConfigError, option

TRAINING = ("pt", "sft", "rlhf")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: memory that a process can have [GiB], dense bf16 [TFLOP/s], memory bandwidth [TB/s]."""

    memory_gib: float
    teraflops: float
    bandwidth: float


# From the makers' data sheets; the memory is what remains of it as CUDA counts it.
GPUS = {
    "A10-24G": Gpu(22.1, 125, 0.6), "RTX4090-24G": Gpu(23.6, 165, 1.01), "L40S-48G": Gpu(44.4, 362, 0.86),
    "A100-40G": Gpu(39.4, 312, 1.56), "A100-80G": Gpu(79.2, 312, 2.04), "A800-80G": Gpu(79.2, 312, 2.04),
    "H20-96G": Gpu(95.1, 148, 4.0), "H800-80G": Gpu(79.1, 989, 3.35), "H100-80G": Gpu(79.1, 989, 3.35),
    "H200": Gpu(139.8, 989, 4.8), "B200": Gpu(178.4, 2250, 8.0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRun:
    """What the command is planned for; its own flags follow it."""

    gpu: str | None = option(None, "kind of GPU; none = those of this machine", choices=tuple(GPUS))
    gpus: int | None = option(
        None, "GPUs in all; none = NPROC_PER_NODE x NNODES, 8 a node of --ips, else this machine's", min=1
    )
    rows: int | None = option(None, "training rows; none = those of local files and of #N", min=1)
    row_tokens: int | None = option(None, "mean tokens of a row (grpo: prompt); none = by file size", min=1)
    command: tuple[str, ...] = option((), "what to plan, such as megatron sft ...; typed, it just follows")

    def check(self) -> None:
        words = [word.replace("_", "-") for word in self.command[1:2]]
        if words != ["launch"] and words not in [[name] for name in TRAINING]:
            raise ConfigError(
                "swift plan needs a training command",
                hint="put it behind the flags: swift plan --gpu H100-80G swift sft --model ...",
            )
