"""What is learnt from a row: the loss of supervised fine-tuning and its variants."""

from dataclasses import dataclass, fields

from swift.config.option import ConfigError, option


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    enable_channel_loss: bool = option(
        False, help="log a loss for every value of the rows' column channel, as loss_<channel>"
    )
    enable_dft_loss: bool = option(
        False, help="weigh every token by the probability that the model gives it (arXiv:2508.05629)"
    )
    label_smoothing_factor: float = option(
        0.0, help="share of the target that is spread evenly over the vocabulary", range=(0, 1)
    )
    neftune_noise_alpha: float | None = option(
        None, help="strength of the noise on embeddings (arXiv:2310.05914); none = no noise", range=(0, None)
    )
    router_aux_loss_coef: float = option(
        0.0, help="weight of the loss that balances the experts of each row; 0 = off", range=(0, None)
    )
    acc_strategy: str = option(
        "token", help="accuracy in the log: of tokens, or of whole rows (seq)", choices=("token", "seq")
    )

    def check(self, *, learns_text: bool = True) -> None:
        for field in () if learns_text else fields(self):
            if field.name != "neftune_noise_alpha" and getattr(self, field.name) != field.default:
                raise ConfigError(f"--{field.name} has no effect without --task_type causal_lm")
        if self.enable_dft_loss and self.label_smoothing_factor:
            raise ConfigError(
                "--enable_dft_loss and --label_smoothing_factor are two targets for one token",
                hint="leave one of them out",
            )
