"""What `swift export` makes of a model."""

from dataclasses import dataclass

from swift.config.model import DTYPES
from swift.config.option import ConfigError, option


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    adapters: tuple[str, ...] = option((), help="checkpoint with adapters; its args.json names the model")
    load_args: bool = option(True, help="take the model from the checkpoint's args.json")
    merge_lora: bool = option(False, help="fold the adapters into the weights")
    to_cached_dataset: bool = option(False, help="encode --dataset for --cached_dataset of a training")
    to_mcore: bool = option(False, help="write --model in Megatron's format, for megatron --mcore_model")
    to_hf: bool = option(False, help="write --mcore_model as a HuggingFace directory")
    mcore_model: str | None = option(
        None, help="weights in Megatron's format: converted, or a run of megatron"
    )
    mcore_adapters: str | None = option(
        None, help="adapters of a run of megatron, folded into the weights by --to_hf"
    )
    test_convert_precision: bool = option(
        False, help="compare the logits of both formats; the exit code says whether they agree"
    )
    test_convert_dtype: str = option("float32", help="precision of that comparison", choices=DTYPES)
    output_dir: str | None = option(
        None, help="where the result goes; none = beside the source, with a suffix"
    )
    exist_ok: bool = option(False, help="write into an existing directory")
    max_shard_size: str = option("5GB", help="largest weight file")

    @property
    def converts(self) -> bool:
        """Whether weights change their format."""
        return self.to_mcore or self.to_hf

    def check(self, model: str | None) -> None:
        """Raises ConfigError unless one thing is asked for, with what it needs. `model` is --model."""
        kinds = ("merge_lora", "to_cached_dataset", "to_mcore", "to_hf")
        asked = [f"--{name}" for name in kinds if getattr(self, name)]
        if not asked:
            raise ConfigError(
                "nothing to export",
                hint="say what: --merge_lora, --to_cached_dataset, --to_mcore or --to_hf true",
            )
        if len(asked) > 1:
            raise ConfigError(f"{' and '.join(asked)} are {len(asked)} exports", hint="do one at a time")
        if self.merge_lora and not self.adapters:
            raise ConfigError(
                "--merge_lora needs --adapters", hint="name a checkpoint directory with adapters"
            )
        self._check_conversion(model)

    def _check_conversion(self, model: str | None) -> None:
        sources = [f"--{name}" for name in ("mcore_model", "mcore_adapters") if getattr(self, name)]
        if self.to_mcore and sources:
            raise ConfigError(
                f"--to_mcore starts from --model, not {sources[0]}", hint="or was --to_hf meant?"
            )
        if self.to_mcore and not model:
            raise ConfigError("--to_mcore needs --model", hint="name a HuggingFace model or directory")
        if self.to_hf and not sources:
            raise ConfigError(
                "--to_hf needs --mcore_model", hint="name the directory that was converted or trained"
            )
        if self.converts and self.adapters:
            raise ConfigError(
                "--adapters has no effect on a conversion",
                hint="fold them in first: swift export --merge_lora true",
            )
        for name in () if self.converts else ("mcore_model", "mcore_adapters", "test_convert_precision"):
            if getattr(self, name):
                raise ConfigError(f"--{name} has no effect without --to_hf or --to_mcore true")
        if self.test_convert_dtype != "float32" and not self.test_convert_precision:
            raise ConfigError("--test_convert_dtype has no effect without --test_convert_precision true")
