"""The runs of `megatron`: those of `swift` with a layout, and what they settle in their own way."""

from dataclasses import dataclass, field, replace

from swift.config.export import ExportOptions
from swift.config.layout import DEGREES, LayoutConfig
from swift.config.megatron import (
    MegatronConfig,
    MegatronOnlineConfig,
    MegatronScheduleConfig,
    MegatronTunerConfig,
)
from swift.config.model import ModelConfig
from swift.config.option import Clash, ConfigError
from swift.config.runs import RlhfRun, SftRun
from swift.config.schedule import OutputConfig


@dataclass(frozen=True, kw_only=True)  # without slots, so that a run with its own can be a base beside it
class OnMegatron:
    """What `megatron sft` and `megatron rlhf` have in common; comes before the run that it changes."""

    tuner: MegatronTunerConfig = field(default_factory=MegatronTunerConfig)
    schedule: MegatronScheduleConfig = field(default_factory=MegatronScheduleConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    @property
    def resumes(self: "MegatronRun") -> str | None:
        """The checkpoint that goes on; with --finetune false what is loaded, adapters before their base."""
        loaded = next(iter(self.tuner.adapters), self.megatron.mcore_model)
        return self.schedule.resume_from_checkpoint or (None if self.megatron.finetune else loaded)

    @property
    def eval_limit(self: "MegatronRun") -> int | None:
        """Rows that an evaluation looks at; None = all."""
        flags = self.megatron
        return None if flags.eval_iters < 0 else flags.eval_iters * flags.global_batch_size

    def check(self: "MegatronRun") -> None:
        _check_megatron(self)

    def check_complete(self: "MegatronRun") -> None:
        super().check_complete()  # type: ignore[misc]
        self.megatron.check()
        _check_project(self.output)


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronSftRun(OnMegatron, SftRun):
    """`megatron sft` and `megatron pt`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronRlhfRun(OnMegatron, RlhfRun):
    """`megatron rlhf`."""

    online: MegatronOnlineConfig = field(default_factory=MegatronOnlineConfig)

    @property
    def answers_itself(self) -> bool:
        """No process has all of the weights that are trained."""
        return False

    def check_complete(self) -> None:
        OnMegatron.check_complete(self)
        shared = next((n for n in DEGREES[:3] if getattr(self.megatron, n) > 1), None)
        far = self.rlhf.teacher_model_server and "--teacher_model_server"
        clash = "conversations of several turns" if self.turns.scheduler else far
        if clash and shared:
            raise Clash(f"--{shared} does not go with {clash} yet")


MegatronRun = MegatronSftRun | MegatronRlhfRun


def _check_megatron(run: MegatronRun) -> None:
    """What can be checked before checkpoints are looked at. --mcore_model names its model by itself."""
    if not run.megatron.finetune and not run.resumes:
        raise ConfigError(
            "--finetune false goes on with a run, and none is named", hint="name it with --mcore_model"
        )
    if run.resumes:
        return
    if run.tuner.train_type == "lora":
        if run.megatron.transformer_impl == "transformer_engine":
            raise ConfigError(
                "--transformer_impl transformer_engine does not go with --train_type lora yet",
                hint="leave it out: adapters stand beside layers of PyTorch's kernels",
            )
        if not run.megatron.save_safetensors:
            raise ConfigError(
                "--save_safetensors false has no effect with --train_type lora: adapters are small files",
                hint="leave it out",
            )
    named = run.model.model or run.megatron.mcore_model
    replace(run, model=replace(run.model, model=named)).check_complete()


def _check_project(output: OutputConfig) -> None:
    """A project is a name in trackers, which earlier versions also switched on."""
    if output.project and not {"wandb", "swanlab", "mlflow", "all"} & set(output.report_to):
        raise ConfigError(
            f"--project {output.project} has no tracker to be a project of", hint="add --report_to wandb"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronExportRun:
    """`megatron export`: conversion by several processes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    export: ExportOptions = field(default_factory=ExportOptions)
    megatron: LayoutConfig = field(default_factory=LayoutConfig)

    def check(self) -> None:
        self.export.check(self.model.model)
        if not self.export.converts:
            raise ConfigError("megatron export converts weights", hint="add --to_mcore true or --to_hf true")
