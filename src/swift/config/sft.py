"""What is learnt from a row: the loss of supervised fine-tuning and its variants."""

from dataclasses import dataclass

from swift.config.option import Clash, changed, option, refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    enable_channel_loss: bool = option(False, "log loss_<channel> for each value of the rows' column channel")
    enable_dft_loss: bool = option(False, "weigh a token by the model's probability of it (arXiv:2508.05629)")
    label_smoothing_factor: float = option(
        0.0, "share of the target that is spread evenly over the vocabulary", range=(0, 1)
    )
    neftune_noise_alpha: float | None = option(
        None, "strength of the noise on embeddings (arXiv:2310.05914); none = no noise", min=0
    )
    router_aux_loss_coef: float = option(0.0, "weight of the loss balancing a row's experts; 0 = off", min=0)
    acc_strategy: str = option(
        "token", "accuracy in the log: of tokens, or of whole rows (seq)", choices=("token", "seq")
    )

    def check(self, *, learns_text: bool = True) -> None:
        if not learns_text:
            refuse(self, {*changed(self)} - {"neftune_noise_alpha"}, "without --task_type causal_lm")
        if self.enable_dft_loss and self.label_smoothing_factor:
            raise Clash("--enable_dft_loss and --label_smoothing_factor are two targets for one token")
