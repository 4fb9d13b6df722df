"""Weights held in fewer bits while adapters are trained on them."""

from dataclasses import dataclass, fields

from swift.config.option import ConfigError, option, refuse, require_package

BITSANDBYTES = "bitsandbytes>=0.46"


@dataclass(frozen=True, kw_only=True, slots=True)
class BnbOptions:
    """How bitsandbytes holds 4 bits."""

    bnb_4bit_compute_dtype: str | None = option(
        None,
        "dtype of products with 4-bit weights; none = the model's",
        choices=("float16", "bfloat16", "float32"),
    )
    bnb_4bit_quant_type: str = option("nf4", "spacing of the 16 values", choices=("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = option(True, "hold the scales of 4-bit blocks in 8 bits too")

    def check_unused(self) -> None:
        """Raises ConfigError for a setting of 4 bits where weights are not held in them."""
        names = [field.name for field in fields(BnbOptions)]
        refuse(self, names, "without --quant_method bnb in 4 bits", hint="leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig(BnbOptions):
    quant_method: str | None = option(
        None, "hold the weights of linear layers in few bits; none = as they are", choices=("bnb",)
    )
    quant_bits: int | None = option(None, "bits of a weight; none = 4", choices=(4, 8))

    def check(self, *, train_type: str, slicer: str | None, init_weights: str) -> None:
        if self.quant_method is None or self.quant_bits == 8:
            self.check_unused()
        if self.quant_method is None:
            if self.quant_bits is not None:
                raise ConfigError(
                    f"--quant_bits {self.quant_bits} has no effect without --quant_method",
                    hint="add --quant_method bnb",
                )
            return
        if train_type == "full":
            raise ConfigError(
                "--quant_method bnb cannot train all weights: few bits cannot take small updates",
                hint="use --train_type lora",
            )
        if slicer:
            raise ConfigError(
                f"--quant_method bnb with {slicer} is not supported",
                hint=f"leave {slicer} out: in 4 bits each process has room for a copy",
            )
        if init_weights.startswith(("pissa", "olora")):
            raise ConfigError(
                f"--init_weights {init_weights} takes its start out of the weights, and few bits cannot hold "
                "the rest",
                hint="leave --init_weights or --quant_method out",
            )
        require_package("bitsandbytes", flag="--quant_method bnb", install=BITSANDBYTES)
