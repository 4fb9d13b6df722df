"""Run configs of commands that resolve but do not run yet: which groups of flags they will have."""

from dataclasses import dataclass, field

from swift.config.data import DataConfig
from swift.config.generation import ExportOptions
from swift.config.model import ModelConfig
from swift.config.plugins import PluginConfig
from swift.config.schedule import OutputConfig
from swift.config.template import TemplateConfig
from swift.config.tuner import TunerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronRun:
    """`megatron pt|sft|rlhf`: batches, steps and parallel sizes have Megatron's own names (fates.tsv)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    plugins: PluginConfig = field(default_factory=PluginConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronExportRun:
    """`megatron export`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    export: ExportOptions = field(default_factory=ExportOptions)


@dataclass(frozen=True, kw_only=True, slots=True)
class WebUiRun:
    """`swift web-ui`: a page without flags."""
