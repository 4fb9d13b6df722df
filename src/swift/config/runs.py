"""Run configs: what one command needs, composed from the groups, and the checks that span groups."""

from dataclasses import dataclass, field

from swift.config.data import DataConfig
from swift.config.generation import ExportOptions, GenerationConfig, InferOptions
from swift.config.model import ModelConfig
from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.config.schedule import OutputConfig, ScheduleConfig
from swift.config.template import TemplateConfig
from swift.config.tuner import TunerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SftRun:
    """`swift sft`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def check(self) -> None:
        """Raises ConfigError where flags contradict each other or one is missing."""
        if self.schedule.resume_from_checkpoint:
            return  # what is missing comes from the checkpoint's args.json; train/resume.py checks again
        self.check_complete()

    def check_complete(self) -> None:
        """`check` for a run whose values are all known."""
        if not self.model.model:
            raise ConfigError("--model is missing", hint="name a model, for example --model smollm2-135m")
        if not self.data.dataset:
            raise ConfigError("--dataset is missing", hint="name a file, for example --dataset data.jsonl")
        if self.data.val_dataset and self.data.split_dataset_ratio:
            raise ConfigError(
                "--val_dataset and --split_dataset_ratio both name evaluation rows",
                hint="leave one of them out",
            )
        if self.schedule.max_steps < 0 and self.schedule.num_train_epochs == 0:
            raise ConfigError("--num_train_epochs 0 trains nothing", hint="give epochs or --max_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRun:
    """`swift infer`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    infer: InferOptions = field(default_factory=InferOptions)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)

    def check(self) -> None:
        """Raises ConfigError where flags contradict each other or one is missing."""
        if not self.model.model and not self.infer.adapters:
            raise ConfigError(
                "--model or --adapters is missing",
                hint="for example --model smollm2-135m, or --adapters CHECKPOINT",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRun:
    """`swift export`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    export: ExportOptions = field(default_factory=ExportOptions)

    def check(self) -> None:
        """Raises ConfigError where flags contradict each other or one is missing."""
        if not self.export.merge_lora:
            raise ConfigError("nothing to export", hint="say what: --merge_lora true")
        if not self.export.adapters:
            raise ConfigError(
                "--merge_lora needs --adapters", hint="name a checkpoint directory with adapters"
            )
