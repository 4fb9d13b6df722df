"""Run configs: what one command needs, composed from the groups, and the checks that span groups."""

from dataclasses import dataclass, field

from swift.config.data import DataConfig
from swift.config.dataset import DatasetOptions
from swift.config.export import ExportOptions, QuantizeOptions
from swift.config.generation import GenerationConfig, InferOptions
from swift.config.layout import LayoutConfig
from swift.config.model import ModelConfig
from swift.config.objective import RlhfConfig
from swift.config.online import ANSWERS, SAMPLES, OnlineConfig
from swift.config.optim import OptimConfig
from swift.config.option import Clash, ConfigError, changed, refuse, refuse_method
from swift.config.parallel import ParallelConfig
from swift.config.plugins import PluginConfig
from swift.config.ppo import PpoConfig
from swift.config.publish import CheckpointPublishing, ResultPublishing
from swift.config.quant import QuantConfig
from swift.config.rewards import REWARDED, RewardConfig
from swift.config.schedule import OutputConfig, ScheduleConfig
from swift.config.serve import ServeOptions
from swift.config.sft import SftConfig
from swift.config.task import TaskConfig
from swift.config.template import TemplateConfig
from swift.config.tuner import TunerConfig
from swift.config.turns import TurnConfig
from swift.config.vllm import RolloutOptions, VllmConfig, VllmRolloutConfig, check_chosen_by_vllm


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRun:
    """What every training has."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    plugins: PluginConfig = field(default_factory=PluginConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    publish: CheckpointPublishing = field(default_factory=CheckpointPublishing)
    given: frozenset[str] = frozenset()  # the flags that somebody typed, also where they are as ever

    @property
    def eval_limit(self) -> int | None:
        """Rows that an evaluation looks at; None = all."""
        return None

    @property
    def data_seed(self) -> int:
        """Seed of sampling, split and order."""
        return self.schedule.seed if self.data.data_seed is None else self.data.data_seed

    def check(self) -> None:
        """Raises ConfigError where flags contradict each other or one is missing."""
        if self.schedule.resume_from_checkpoint:
            return  # what is missing comes from the checkpoint's args.json; train/resume.py checks again
        self.check_complete()

    def check_complete(self) -> None:
        """`check` for a run whose values are all known."""
        if not self.model.model:
            raise ConfigError("--model is missing", hint="name a model, for example --model smollm2-135m")
        if not self.data.dataset and not self.data.cached_dataset:
            raise ConfigError("--dataset is missing", hint="name a file, for example --dataset data.jsonl")
        if self.data.val_dataset and self.data.split_dataset_ratio:
            raise Clash("--val_dataset and --split_dataset_ratio both name evaluation rows")
        self.data.check()
        self.template.check()
        self.output.profiled  # noqa: B018 - raises ConfigError
        self.publish.check()
        if self.publish.push_to_hub and self.schedule.save_strategy == "no":
            raise ConfigError("--push_to_hub needs checkpoints", hint="leave --save_strategy no out")
        self._check_evaluation()
        self.tuner.check()
        slicer, train_type = self.parallel.slicer, self.tuner.train_type
        self.quant.check(train_type=train_type, slicer=slicer, init_weights=self.tuner.init_weights)
        self.optim.check(train_type=train_type, slicer=slicer)
        self.schedule.check_precision(self.model.torch_dtype)
        self.parallel.check()
        if self.parallel.sequence_parallel_size > 1:
            self._check_sequence_parallel()
        if self.data.streaming:
            self._check_stream()
        if self.data.packing_length is not None:
            self._check_packing_length(self.data.packing_length)
        if self.schedule.max_steps < 0 and self.schedule.num_train_epochs == 0:
            raise ConfigError("--num_train_epochs 0 trains nothing", hint="give epochs or --max_steps")

    def _check_evaluation(self) -> None:
        if self.data.val_dataset or self.data.split_dataset_ratio or self.data.cached_dataset:
            return
        for flag in ("early_stop_interval", "eval_on_start"):
            if getattr(self.schedule, flag):
                raise ConfigError(
                    f"--{flag} needs rows to evaluate", hint="--val_dataset or --split_dataset_ratio"
                )

    def _check_sequence_parallel(self) -> None:
        clash = None
        if self.schedule.padding_free is False:
            clash = "--padding_free false"
        elif self.model.attn_impl is not None and not self.model.attn_impl.startswith("flash"):
            clash = f"--attn_impl {self.model.attn_impl}"
        if clash:
            size = self.parallel.sequence_parallel_size
            raise ConfigError(
                f"{clash} cannot be combined with --sequence_parallel_size {size}", hint="leave it out"
            )

    def _check_stream(self) -> None:
        if self.schedule.max_steps < 0:
            raise ConfigError(
                "--streaming true needs --max_steps: how many rows there are is not known",
                hint="for example --max_steps 1000",
            )
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(self.schedule, name) == "epoch":
                raise ConfigError(
                    f"--{name} epoch: with --streaming true nobody knows when a pass will end",
                    hint=f"--{name} steps",
                )

    def _check_packing_length(self, length: int) -> None:
        if not self.data.packing:
            names = ("packing_length",)
            refuse(self.data, names, "without --packing true", hint="add it, or leave both out")
        if length < (self.template.max_length or 0):
            raise ConfigError(
                f"--packing_length {length} is below --max_length {self.template.max_length}: "
                "a row has to fit into a pack",
                hint="lower --max_length, or raise --packing_length",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SftRun(TrainRun):
    """`swift sft` and `swift pt`."""

    task: TaskConfig = field(default_factory=TaskConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    def check_complete(self) -> None:
        TrainRun.check_complete(self)
        self.task.check()
        self.sft.check(learns_text=self.task.task_type == "causal_lm")


@dataclass(frozen=True, kw_only=True, slots=True)
class RlhfRun(TrainRun):
    """`swift rlhf`: preferences and rewards instead of answers to repeat."""

    rlhf: RlhfConfig = field(default_factory=RlhfConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    turns: TurnConfig = field(default_factory=TurnConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    vllm: VllmRolloutConfig = field(default_factory=VllmRolloutConfig)

    @property
    def answers_itself(self) -> bool:
        """Whether answers come from the very weights that are trained."""
        return not self.vllm.use_vllm

    def check_complete(self) -> None:
        TrainRun.check_complete(self)
        self.rlhf.check()
        self.online.check(self.rlhf.rlhf_type)
        self.ppo.check(self.rlhf.rlhf_type)
        for group in (self.rewards, self.turns):
            refuse_method(group, changed(group), self.rlhf.rlhf_type, REWARDED)
        self.turns.check()
        if self.turns.scheduler and self.parallel.sequence_parallel_size > 1:
            raise ConfigError(
                "--sequence_parallel_size does not go with conversations of several turns yet",
                hint="leave out --multi_turn_scheduler and --use_gym_env, or --sequence_parallel_size",
            )
        if self.rlhf.rlhf_type in SAMPLES:
            self.rewards.check(
                max_completion_length=self.online.max_completion_length,
                has_environment=self.turns.use_gym_env,
            )
            if "cispo" in self.rlhf.losses and self.online.epsilon_high is None:
                raise ConfigError(
                    "--loss_type cispo needs --epsilon_high, the largest weight of a token", hint="5 is usual"
                )
        if self.rlhf.rlhf_type in ANSWERS:
            self.vllm.check_rollout()
        else:
            self.vllm.check_unused(f"--rlhf_type {' or '.join(ANSWERS)}")
        if self.online.async_generate:
            self.vllm.check_ahead(has_turns=self.turns.scheduler is not None)
        if self.data.cached_dataset:
            raise ConfigError("--cached_dataset holds conversations for swift sft", hint="give --dataset")
        if self.rlhf.needs_reference and self.tuner.init_weights.startswith(("pissa", "olora")):
            raise ConfigError(
                f"--init_weights {self.tuner.init_weights} changes the weights that --rlhf_type "
                f"{self.rlhf.rlhf_type} takes for its reference",
                hint="leave --init_weights out",
            )
        if self.rlhf.sync_ref_model and (self.tuner.train_type != "full" or self.parallel.zero):
            clash = "--deepspeed" if self.parallel.zero else f"--train_type {self.tuner.train_type}"
            raise ConfigError(
                f"--sync_ref_model true cannot be combined with {clash}: it mixes all weights into a copy",
                hint="--train_type full, on several GPUs with --fsdp fsdp2",
            )
        if self.rlhf.ref_model and self.tuner.train_type != "full":
            raise ConfigError(
                f"--ref_model has no use with --train_type {self.tuner.train_type}: "
                "the reference is the model without its adapters",
                hint="leave --ref_model out",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRun:
    model: ModelConfig = field(default_factory=ModelConfig)
    infer: InferOptions = field(default_factory=InferOptions)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    plugins: PluginConfig = field(default_factory=PluginConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def data_seed(self) -> int:
        """Seed of #N."""
        return self.generation.seed if self.infer.data_seed is None else self.infer.data_seed

    def check(self) -> None:
        _check_answering(self, self.infer)
        self.infer.check()
        if self.infer.infer_backend == "vllm":
            why, hint = "on --infer_backend vllm", "swift export --merge_lora true, or leave it out"
            refuse(self.quant, ("quant_method",), why, hint="--vllm_quantization")
            refuse(self.infer, ("merge_lora",), why, hint=hint)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRun:
    model: ModelConfig = field(default_factory=ModelConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)

    def check(self) -> None:
        if not self.model.model:
            raise ConfigError("--model is missing", hint="name the model that the training starts from")
        check_chosen_by_vllm(self.model, "swift rollout")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployRun:
    model: ModelConfig = field(default_factory=ModelConfig)
    serve: ServeOptions = field(default_factory=ServeOptions)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    plugins: PluginConfig = field(default_factory=PluginConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def check(self) -> None:
        _check_answering(self, self.serve)
        self.serve.check()
        why = "on swift deploy: each request says whether it streams"
        refuse(self.generation, ("stream",), why, hint="leave it out")
        if self.serve.infer_backend != "vllm":
            why = "on swift deploy, which has an attention of its own"
            refuse(self.model, ("attn_impl",), why, hint="leave it out")


def _check_answering(run: InferRun | DeployRun, options: InferOptions | ServeOptions) -> None:
    """What `swift infer` and `swift deploy` have in common. Raises ConfigError."""
    if not run.model.model and not options.adapters:
        raise ConfigError(
            "--model or --adapters is missing",
            hint="for example --model smollm2-135m, or --adapters CHECKPOINT",
        )
    run.generation.check()
    run.quant.check(train_type="lora", slicer=None, init_weights="")
    if run.quant.quant_method and options.merge_lora:
        raise Clash("--merge_lora with --quant_method: few bits cannot hold the sum")
    if options.infer_backend == "vllm":
        check_chosen_by_vllm(run.model, "--infer_backend vllm")
    else:
        run.vllm.check_unused("--infer_backend vllm")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRun:
    model: ModelConfig = field(default_factory=ModelConfig)
    export: ExportOptions = field(default_factory=ExportOptions)
    quant: QuantizeOptions = field(default_factory=QuantizeOptions)
    publish: ResultPublishing = field(default_factory=ResultPublishing)
    data: DataConfig = field(default_factory=DataConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    plugins: PluginConfig = field(default_factory=PluginConfig)

    def check(self) -> None:
        pushes = self.publish.push_to_hub
        self.export.check(self.model.model, quant_method=self.quant.quant_method, pushes=pushes)
        self.quant.check(self.data.dataset)
        self.publish.check()
        if not self.export.converts and not self.model.model and not self.export.adapters:
            raise ConfigError("--model or --adapters is missing: it names what is exported")
        if pushes and not self.export.merge_lora and self.model.model and self.export.adapters:
            raise ConfigError(
                "--model and --adapters are two things to push", hint="name one, or add --merge_lora true"
            )
        if self.export.to_cached_dataset:
            if not self.model.model or not self.data.dataset:
                raise ConfigError("--to_cached_dataset needs --model and --dataset")
            if self.data.cached_dataset or self.data.packing or self.data.streaming:
                raise ConfigError(
                    "--cached_dataset, --packing and --streaming have no effect on --to_cached_dataset",
                    hint="give them to the training that uses the encoded rows",
                )
            self.data.check()
            self.template.check()

    @property
    def megatron(self) -> LayoutConfig:
        """Degrees of a conversion: one process does all of it."""
        return LayoutConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class WebUiRun:
    """`swift web-ui`: a page without flags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRun:
    options: DatasetOptions = field(default_factory=DatasetOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    plugins: PluginConfig = field(default_factory=PluginConfig)

    def check(self) -> None:
        if not self.options.dataset:
            raise ConfigError(
                "no dataset is named", hint=f"for example: swift dataset {self.options.action} data.jsonl"
            )
        if not self.model.model:
            raise ConfigError(
                "--model is missing: its tokenizer and template say what is trained",
                hint="name a model, for example --model smollm2-135m",
            )
        if any(number < 1 for number in self.options.row):
            raise ConfigError(f"--row counts from 1, got {min(self.options.row)}")
