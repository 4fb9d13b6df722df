"""What `swift export` makes of a model."""

from dataclasses import dataclass

from swift.config.model import DTYPES
from swift.config.option import ConfigError, option, refuse, require_package
from swift.config.quant import BnbOptions

QUANT_METHODS = ("bnb", "fp8", "gptq", "awq")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    adapters: tuple[str, ...] = option((), "checkpoint with adapters; its args.json names the model")
    load_args: bool = option(True, "take the model from the checkpoint's args.json")
    merge_lora: bool = option(False, "fold the adapters into the weights")
    to_cached_dataset: bool = option(False, "encode --dataset for --cached_dataset of a training")
    to_mcore: bool = option(False, "write --model in Megatron's format, for megatron --mcore_model")
    to_hf: bool = option(False, "write --mcore_model as a HuggingFace directory")
    mcore_model: str | None = option(None, "weights in Megatron's format: converted, or a run of megatron")
    mcore_adapters: str | None = option(None, "adapters of a run of megatron, folded in by --to_hf")
    test_convert_precision: bool = option(
        False, "compare the logits of both formats; the exit code says whether they agree"
    )
    test_convert_dtype: str = option("float32", "precision of that comparison", choices=DTYPES)
    to_ollama: bool = option(False, "write a Modelfile with which `ollama create` takes the model")
    to_peft_format: bool = option(False, "copy the adapters alone, which are in PEFT's format anyway")
    output_dir: str | None = option(None, "where the result goes; none = beside the source, with a suffix")
    exist_ok: bool = option(False, "write into an existing directory")
    max_shard_size: str = option("5GB", "largest weight file")

    @property
    def converts(self) -> bool:
        """Whether weights change their format."""
        return self.to_mcore or self.to_hf

    def check(self, model: str | None, *, quant_method: str | None = None, pushes: bool = False) -> None:
        """Raises ConfigError unless one thing is asked for, with what it needs. `model` is --model.

        Adapters may be merged on the way to another thing, and a directory of a model may be pushed after it.
        """
        kinds = ("to_cached_dataset", "to_mcore", "to_hf", "to_ollama", "to_peft_format")
        asked = [f"--{name}" for name in kinds if getattr(self, name)]
        asked += ["--quant_method"] if quant_method else []
        if self.merge_lora and (not asked or asked[0] not in ("--to_ollama", "--quant_method")):
            asked.insert(0, "--merge_lora")
        if pushes and asked not in ([], ["--merge_lora"], ["--quant_method"]):
            asked.append("--push_to_hub")
        if not asked and not pushes:
            raise ConfigError(
                "nothing to export",
                hint="say what: --merge_lora, --quant_method, --push_to_hub, --to_ollama, --to_peft_format, "
                "--to_mcore, --to_hf or --to_cached_dataset",
            )
        if len(asked) > 1:
            raise ConfigError(f"{' and '.join(asked)} are {len(asked)} exports", hint="do one at a time")
        if (self.merge_lora or self.to_peft_format) and not self.adapters:
            name = "merge_lora" if self.merge_lora else "to_peft_format"
            raise ConfigError(f"--{name} needs --adapters", hint="name a checkpoint directory with adapters")
        if (self.to_ollama or quant_method) and self.adapters and not self.merge_lora:
            raise ConfigError(f"{asked[0]} takes whole weights, not adapters", hint="add --merge_lora true")
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
        if self.converts:
            hint = "fold them in first: swift export --merge_lora true"
            refuse(self, ("adapters",), "on a conversion", hint=hint)
        else:
            names = ("mcore_model", "mcore_adapters", "test_convert_precision")
            refuse(self, names, "without --to_hf or --to_mcore true")
        if not self.test_convert_precision:
            refuse(self, ("test_convert_dtype",), "without --test_convert_precision true")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions(BnbOptions):
    quant_method: str | None = option(None, "write linear layers' weights in few bits", choices=QUANT_METHODS)
    quant_bits: int | None = option(None, "bits of a weight; none = 4, with fp8 8", choices=(4, 8))
    group_size: int = option(
        128, "weights of a row that share a scale in gptq and awq; -1 = the whole row", range=(-1, None)
    )
    quant_n_samples: int = option(256, "rows of --dataset that gptq and awq look at", unit="rows", min=1)
    quant_batch_size: int = option(1, "of them, rows computed together", unit="rows", min=1)

    @property
    def bits(self) -> int:
        return self.quant_bits or (8 if self.quant_method == "fp8" else 4)

    @property
    def suffix(self) -> str:
        """Of the result's directory."""
        return "-fp8" if self.quant_method == "fp8" else f"-{self.quant_method}-int{self.bits}"

    def check(self, datasets: tuple[str, ...]) -> None:
        """Raises ConfigError where the weights cannot be written like that; `datasets` is --dataset."""
        method = self.quant_method
        calibrated = method in ("gptq", "awq")
        if method != "bnb" or self.bits != 4:
            self.check_unused()
        if not calibrated:
            names = ("group_size", "quant_n_samples", "quant_batch_size")
            refuse(self, names, "without --quant_method gptq or awq")
        if method is None:
            if self.quant_bits is not None:
                raise ConfigError(
                    f"--quant_bits {self.quant_bits} has no effect without --quant_method",
                    hint="add --quant_method bnb, fp8, gptq or awq",
                )
            return
        if (method, self.bits) in (("fp8", 4), ("awq", 8)):
            raise ConfigError(f"--quant_method {method} has {12 - self.bits} bits, not {self.bits}")
        if calibrated and not datasets:
            raise ConfigError(
                f"--quant_method {method} needs --dataset",
                hint="rows like those that the model will see; with bnb and fp8 none are needed",
            )
        if calibrated:
            require_package("llmcompressor", flag=f"--quant_method {method}", install="swiftune[gptq]")
        if method == "bnb":
            require_package("bitsandbytes", flag="--quant_method bnb", install="swiftune[quant]")
