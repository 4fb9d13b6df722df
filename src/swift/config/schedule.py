"""How long, in which steps, and how often something is logged, evaluated and saved."""

from dataclasses import dataclass

from swift.config.option import Clash, ConfigError, option

STRATEGIES = ("no", "steps", "epoch")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    num_train_epochs: float = option(3.0, "passes over the training rows", min=0)
    max_steps: int = option(-1, "stop after this many steps; -1 = by epochs", unit="steps")
    per_device_train_batch_size: int = option(1, "rows (or packs) in one micro-batch", unit="rows", min=1)
    per_device_eval_batch_size: int = option(1, "rows in one evaluation batch", unit="rows", min=1)
    gradient_accumulation_steps: int | None = option(
        None, "micro-batches in a step; none = as many as make 16 rows (or packs)", min=1
    )
    gradient_checkpointing: bool | None = option(
        None, "recompute activations to save memory; none = on a GPU yes, on a CPU no"
    )
    torch_compile: bool = option(False, "compile the layers with torch: faster steps after a minute")
    torch_compile_backend: str = option("inductor", "compiler of --torch_compile true")
    activation_cpu_offload: bool = option(False, "keep what backward passes need on the CPU (GPU training)")
    bf16: bool = option(False, "bfloat16 arithmetic, also over the exact weights of --torch_dtype float32")
    fp16: bool = option(False, "float16 arithmetic with loss scaling; trained weights are kept in float32")
    padding_free: bool | None = option(
        None, "rows as one flat sequence without padding; none = wherever the model allows it"
    )
    dataloader_drop_last: bool = option(False, "leave out the last step of an epoch where it is smaller")
    full_determinism: bool = option(
        False, "only kernels that give the same bits every time: slower, for GPU runs that are compared"
    )
    tf32: bool = option(False, "products of float32 matrices in TF32: faster, less exact (GPU training)")
    logging_strategy: str = option(
        "steps", "when to log; the first and the last step always are, unless 'no'", choices=STRATEGIES
    )
    logging_steps: int = option(5, "steps between lines of the log", min=1)
    disable_tqdm: bool = option(False, "show no progress bar")
    eval_strategy: str | None = option(None, "when to evaluate; none = --save_strategy", choices=STRATEGIES)
    eval_steps: float | None = option(None, "steps between evaluations, or share of all; none = --save_steps")
    eval_delay: float = option(0.0, "no evaluation before this step (--eval_strategy epoch: epoch)", min=0)
    eval_on_start: bool = option(False, "evaluate once before the first step")
    early_stop_interval: int | None = option(
        None, "stop after this many evaluations without a better --metric_for_best_model; none = never", min=1
    )
    save_strategy: str = option("steps", "when to save; the last step too, unless 'no'", choices=STRATEGIES)
    save_steps: float = option(500, "steps between checkpoints, or a share of all steps below 1")
    save_total_limit: int | None = option(None, "checkpoints kept; the best and the last always are", min=1)
    save_only_model: bool = option(False, "leave out optimizer and random states: smaller, cannot be resumed")
    metric_for_best_model: str = option("loss", "evaluation metric that names the best checkpoint")
    greater_is_better: bool | None = option(None, "direction of that metric; none = lower for losses")
    resume_from_checkpoint: str | None = option(
        None, "checkpoint or run directory to go on from (the run directory's last whole checkpoint)"
    )
    seed: int = option(42, "seed of everything random")

    @property
    def best_metric(self) -> str:
        """The name of --metric_for_best_model in the log."""
        return f"eval_{self.metric_for_best_model.removeprefix('eval_')}"

    @property
    def lower_is_better(self) -> bool:
        if self.greater_is_better is not None:
            return not self.greater_is_better
        return self.metric_for_best_model.endswith("loss")

    @property
    def compute(self) -> str | None:
        """dtype of the arithmetic where the weights are float32; None = theirs."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None

    def check_precision(self, torch_dtype: str | None) -> None:
        """Raises ConfigError where two flags ask for two half precisions."""
        if self.bf16 and self.fp16:
            raise Clash("--bf16 and --fp16 contradict each other")
        if self.compute and torch_dtype not in (None, "float32", self.compute):
            flag = "--bf16" if self.bf16 else "--fp16"
            raise ConfigError(
                f"{flag} true contradicts --torch_dtype {torch_dtype}",
                hint=f"--torch_dtype {self.compute}, or float32 for weights that stay exact",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Where a run goes, and who is told about it."""

    output_dir: str | None = option(None, "where runs go; none = output/<model name>")
    add_version: bool = option(True, "give every run a directory vN-date of its own")
    logging_dir: str | None = option(None, "TensorBoard directory; none = runs/ in the run directory")
    report_to: tuple[str, ...] = option(
        ("tensorboard",),
        "trackers that are sent every number; all = those installed, none = no pictures either",
        choices=("tensorboard", "wandb", "swanlab", "mlflow", "all", "none"),
    )
    run_name: str | None = option(None, "name of the run in trackers; none = the run directory's")
    project: str | None = option(None, "project (MLflow: experiment) in trackers; none = theirs")
    swanlab_mode: str = option(
        "cloud", "where SwanLab keeps runs", choices=("cloud", "local", "offline", "disabled")
    )
    swanlab_workspace: str | None = option(None, "SwanLab workspace; none = your own")
    swanlab_token: str | None = option(None, "SwanLab API key; none = that of `swanlab login`")
    callbacks: tuple[str, ...] = option((), "callbacks by the name they are registered under or file.py:name")
    profile_steps: str | None = option(
        None, "leave a profile of these steps in the run directory, such as 10:13; none = no profile"
    )
    create_checkpoint_symlink: bool = option(True, "keep the links last and best up to date")

    @property
    def profiled(self) -> range | None:
        """The steps of --profile_steps, first to last. Raises ConfigError."""
        if self.profile_steps is None:
            return None
        first, _, last = self.profile_steps.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ConfigError(
                f"--profile_steps {self.profile_steps} is not FIRST:LAST", hint="for example 10:13"
            )
        return range(int(first), int(last) + 1)
