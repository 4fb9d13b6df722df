"""What only the Megatron engine has to know: its kernels, its mixtures of experts, its kind of checkpoints.

Batch, schedule and optimizer have the same fields as elsewhere; Megatron's names are in cli/fates.tsv.
"""

import math
from dataclasses import dataclass

from swift.config.layout import Layout, LayoutConfig
from swift.config.online import OnlineConfig, RolloutPlan
from swift.config.option import ConfigError, option, refuse
from swift.config.schedule import ScheduleConfig
from swift.config.tuner import TunerConfig

# What recomputation may leave out of memory, each with its forward pass done again.
MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronConfig(LayoutConfig):
    """Degrees of parallelism, recomputation, mixtures of experts, and what is loaded."""

    global_batch_size: int = option(16, "rows (or packs) in a step, over all processes", unit="rows", min=1)
    eval_iters: int = option(
        -1,
        "steps' worth of rows that an evaluation looks at; -1 = all, 0 = no evaluation",
        range=(-1, None),
    )
    mcore_model: str | None = option(
        None, "directory with weights in Megatron's format: converted ones, or a run of megatron"
    )
    finetune: bool = option(True, "take only weights; no = go on with the run of --mcore_model, --adapters")
    no_load_optim: bool = option(False, "go on without the optimizer's state")
    no_load_rng: bool = option(False, "go on without the random states")
    save_safetensors: bool = option(
        True, "save weights as a HuggingFace directory; no = in Megatron's format (torch_dist) alone"
    )
    transformer_impl: str = option(
        "auto",
        "whose layers: PyTorch's or transformer-engine's; auto = the latter where it is installed",
        choices=("auto", "torch", "transformer_engine"),
    )
    attention_backend: str = option(
        "flash",
        "attention kernels; all three names take the fastest exact one for each batch",
        choices=("flash", "fused", "auto"),
    )
    use_distributed_optimizer: bool = option(True, "slice the optimizer over data parallel ranks (ZeRO-1)")
    overlap_grad_reduce: bool = option(False, "add up gradients while the backward pass still runs")
    overlap_param_gather: bool = option(False, "gather updated weights while the forward pass already runs")
    recompute_granularity: str = option(
        "selective",
        "what the backward pass computes again to save memory: nothing, some modules, whole layers",
        choices=("none", "selective", "full"),
    )
    recompute_modules: tuple[str, ...] = option(("core_attn",), "the modules of selective", choices=MODULES)
    recompute_method: str | None = option(
        None,
        "layers of full: uniform = all, kept at the start of every chunk; block = only the first ones",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(
        None, "layers in a chunk (uniform), or recomputed on each pipeline process (block)",
        min=1,
    )  # fmt: skip
    gradient_accumulation_fusion: bool | None = option(
        None, "add weight gradients up inside the matrix product; none = where the kernel is there"
    )
    moe_grouped_gemm: bool = option(True, "all experts of a process in one matrix product")
    moe_permute_fusion: bool = option(False, "one kernel that sorts tokens by expert")
    moe_shared_expert_overlap: bool = option(False, "compute shared experts while tokens travel to others")
    moe_aux_loss_coeff: float = option(
        0.0, "weight of the loss that balances the experts, a mean over layers; 0 = off", min=0
    )
    moe_z_loss_coeff: float | None = option(
        None, "weight of the loss that keeps the router's logits small; none = off", min=0
    )
    moe_router_bias_update_rate: float | None = option(
        None, "how far a step moves the biases that even out experts, where the model has such "
        "(DeepSeek-V3); none = 0.001, with adapters 0", min=0,
    )  # fmt: skip
    moe_router_dtype: str | None = option(
        "fp32", "precision of the router; none = that of the model", choices=("fp32", "fp64")
    )
    moe_token_dispatcher_type: str = option(
        "alltoall", "how tokens reach their experts", choices=("alltoall", "allgather")
    )
    moe_expert_capacity_factor: float | None = option(
        None, "most tokens of an expert, as a multiple of an even share; none = no token is dropped",
        min=0,
    )  # fmt: skip

    def check(self) -> None:
        """Raises ConfigError where flags contradict each other; what depends on the model is in layout.py."""
        names = ("recompute_method", "recompute_num_layers")
        missing = next((name for name in names if getattr(self, name) is None), None)
        if self.recompute_granularity != "full":
            why = f"with --recompute_granularity {self.recompute_granularity}"
            refuse(self, names, why, hint="add --recompute_granularity full, or leave it out")
        elif missing:
            raise ConfigError(
                f"--recompute_granularity full needs --{missing}",
                hint="--recompute_method uniform --recompute_num_layers 1 saves the most memory",
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigError(
                "--overlap_param_gather true needs --use_distributed_optimizer and --overlap_grad_reduce true"
            )
        if self.moe_shared_expert_overlap and self.moe_token_dispatcher_type != "alltoall":
            raise ConfigError("--moe_shared_expert_overlap true needs --moe_token_dispatcher_type alltoall")

    def check_layers(self, layout: Layout) -> None:
        """Raises ConfigError where a chunk of layers that are recomputed together would not be full."""
        chunk = self.recompute_num_layers
        if self.recompute_method != "uniform" or chunk is None:
            return
        common = math.gcd(*layout.layers) // (layout.virtual or 1)
        if common % chunk:
            fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
            raise ConfigError(
                f"--recompute_num_layers {chunk} does not divide the {common} layers in a row on a process "
                f"(it can be {fitting})",
                hint="--recompute_method block takes any number: the layers whose forward pass is done again",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronTunerConfig(TunerConfig):
    """What is trained: all weights unless adapters are asked for."""

    train_type: str = option("full", "train all weights or adapters", choices=("full", "lora"))
    merge_lora: bool = option(False, "write the model with adapters folded in beside the last checkpoint")

    def check(self) -> None:
        TunerConfig.check(self)
        if self.merge_lora and self.train_type == "full":
            raise ConfigError("--merge_lora true has no effect with --train_type full")


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronScheduleConfig(ScheduleConfig):
    """How long, in which steps, and how often something is logged, evaluated and saved."""

    padding_free: bool = option(True, "rows as one flat sequence without padding")


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronOnlineConfig(OnlineConfig):
    """Answers that the model samples itself. A step has --global_batch_size of them."""

    steps_per_generation: int | None = option(
        None, "optimizer steps that one rollout fills; none = 1", unit="steps", min=1
    )

    def plan(self, micro_batch_size: int, accumulation: int, data_world: int) -> RolloutPlan:
        """What one rollout is. Raises ConfigError where the numbers do not go together."""
        step = micro_batch_size * accumulation * data_world
        answers = self.generation_batch_size or step * (self.steps_per_generation or 1)
        if answers % step:
            raise ConfigError(
                f"--generation_batch_size {answers} is not a multiple of --global_batch_size {step}",
                hint=f"for example {step * max(answers // step, 1)}",
            )
        prompts, rest = divmod(answers, self.num_generations)
        if rest:
            raise ConfigError(
                f"a rollout has {answers} answers (--global_batch_size {step} x {answers // step} steps), "
                f"which is not a multiple of --num_generations {self.num_generations}",
                hint=f"for example --global_batch_size {math.lcm(step, self.num_generations)}",
            )
        return RolloutPlan(prompts, self.num_generations, answers // step, self.num_iterations)
