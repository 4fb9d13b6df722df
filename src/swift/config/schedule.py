"""How long, in which steps, and how often something is logged, evaluated and saved."""

from dataclasses import dataclass

from swift.config.option import ConfigError, option

STRATEGIES = ("no", "steps", "epoch")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    num_train_epochs: float = option(3.0, help="passes over the training rows", range=(0, None))
    max_steps: int = option(-1, help="stop after this many steps; -1 = by epochs", unit="steps")
    per_device_train_batch_size: int = option(
        1, help="rows (or packs) in one micro-batch", unit="rows", range=(1, None)
    )
    per_device_eval_batch_size: int = option(
        1, help="rows in one evaluation batch", unit="rows", range=(1, None)
    )
    gradient_accumulation_steps: int | None = option(
        None, help="micro-batches in a step; none = as many as make 16 rows (or packs)", range=(1, None)
    )
    gradient_checkpointing: bool | None = option(
        None, help="recompute activations to save memory; none = on a GPU yes, on a CPU no"
    )
    activation_cpu_offload: bool = option(
        False, help="keep what waits for the backward pass in the CPU's memory (GPU training)"
    )
    bf16: bool = option(
        False, help="bfloat16 arithmetic, also over float32 weights (--torch_dtype float32 keeps those exact)"
    )
    fp16: bool = option(
        False, help="float16 arithmetic with loss scaling; trained weights are kept in float32"
    )
    padding_free: bool | None = option(
        None, help="rows as one flat sequence without padding; none = wherever the model allows it"
    )
    logging_steps: int = option(
        5, help="steps between lines of the log (the first step is always logged)", range=(1, None)
    )
    eval_strategy: str | None = option(
        None, help="when to evaluate; none = as --save_strategy", choices=STRATEGIES
    )
    eval_steps: float | None = option(
        None, help="steps between evaluations, or a share of all; none = --save_steps"
    )
    save_strategy: str = option(
        "steps", help="when to save (the last step is always saved unless 'no')", choices=STRATEGIES
    )
    save_steps: float = option(500, help="steps between checkpoints, or a share of all steps below 1")
    save_total_limit: int | None = option(
        None, help="checkpoints kept; the best and the last always are", range=(1, None)
    )
    save_only_model: bool = option(
        False, help="leave out optimizer and random states: smaller, cannot be resumed"
    )
    metric_for_best_model: str = option("loss", help="evaluation metric that names the best checkpoint")
    greater_is_better: bool | None = option(None, help="direction of that metric; none = lower for losses")
    resume_from_checkpoint: str | None = option(
        None, help="checkpoint or run directory to go on from (the run directory's last whole checkpoint)"
    )
    seed: int = option(42, help="seed of everything random")

    @property
    def compute(self) -> str | None:
        """dtype of the arithmetic where the weights are float32; None = theirs."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None

    def check_precision(self, torch_dtype: str | None) -> None:
        """Raises ConfigError where two flags ask for two half precisions."""
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 contradict each other", hint="leave one of them out")
        if self.compute and torch_dtype not in (None, "float32", self.compute):
            flag = "--bf16" if self.bf16 else "--fp16"
            raise ConfigError(
                f"{flag} true contradicts --torch_dtype {torch_dtype}",
                hint=f"--torch_dtype {self.compute}, or float32 for weights that stay exact",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Where a run goes, and who is told about it."""

    output_dir: str | None = option(None, help="where runs go; none = output/<model name>")
    add_version: bool = option(True, help="give every run a directory vN-date of its own")
    logging_dir: str | None = option(None, help="TensorBoard directory; none = runs/ in the run directory")
    report_to: tuple[str, ...] = option(("tensorboard",), help="trackers", choices=("tensorboard", "none"))
    create_checkpoint_symlink: bool = option(True, help="keep the links last and best up to date")
