"""What `swift rlhf` optimises: method, losses, reference model.

Owns: the knobs, which of them belong to which method, and the refusal of contradictions. Not here: formulas
(objectives/), how a reference model is run.
"""

from dataclasses import dataclass

from swift.config.option import Clash, ConfigError, changed, option, refuse, refuse_method

# method -> the losses it knows, its default first; () = it has one loss without a name.
LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": (
        "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
        "aot_pair", "apo_zero", "apo_down", "discopop", "sft",
    ),
    "cpo": ("sigmoid", "hinge", "ipo", "simpo"),
    "simpo": ("simpo",),
    "kto": ("kto", "apo_zero_unpaired"),
    "orpo": (),
    "rm": (),
    "grpo": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"),
    "gkd": (),
    "ppo": (),
}  # fmt: skip
RLHF_TYPES = tuple(LOSSES)

# What has an effect only with some methods, or only with some losses.
FLAGS_OF: dict[tuple[str, ...], tuple[str, ...]] = {
    ("dpo", "cpo", "simpo", "kto", "orpo", "grpo", "gkd"): ("beta",),
    ("gkd",): ("teacher_model", "teacher_model_server", "lmbda", "gkd_logits_topk", "sft_alpha"),
    ("dpo",): (
        "loss_weights", "rpo_alpha", "ld_alpha", "discopop_tau", "reference_free", "f_divergence_type",
        "f_alpha_divergence_coef",
    ),
    ("dpo", "cpo", "simpo"): ("label_smoothing",),
    ("cpo", "simpo"): ("cpo_alpha", "simpo_gamma"),
    ("kto",): ("desirable_weight", "undesirable_weight"),
    ("rm",): ("center_rewards_coefficient",),
    ("dpo", "kto", "grpo", "ppo"): ("ref_model", "ref_adapters"),
    ("dpo", "kto"): ("precompute_ref_log_probs",),
    ("dpo", "kto", "grpo"): ("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"),
}  # fmt: skip
METHODS_OF = {flag: methods for methods, flags in FLAGS_OF.items() for flag in flags}
LOSSES_OF: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid", "robust", "exo_pair", "aot", "aot_pair", "simpo"),
    "discopop_tau": ("discopop",),
    "simpo_gamma": ("simpo",),
    "f_divergence_type": ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop"),
}
BETAS = {"simpo": 2.0, "grpo": 0.04, "gkd": 0.5}  # where it is not 0.1
REFERENCE_FLAGS = ("ref_model", "ref_adapters", "precompute_ref_log_probs", "sync_ref_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class RlhfConfig:
    rlhf_type: str = option(
        "dpo",
        "method: dpo, kto, orpo, simpo or cpo from preferences; rm trains a reward model; grpo "
        "learns from rewards of its own answers, gkd from a teacher, ppo with a value model",
        choices=RLHF_TYPES,
    )
    beta: float | None = option(
        None,
        "strength of the pull towards the reference model (orpo: weight of the odds ratio); "
        "none = 2 for simpo, 0.04 for grpo (0 = no reference), 0.5 for gkd (0 = forward KL, 1 = reverse KL), "
        "0.1 otherwise",
        min=0,
    )
    loss_type: tuple[str, ...] | None = option(
        None, "loss, for dpo one or several; none = sigmoid (dpo, cpo), kto (kto), simpo (simpo), grpo (grpo)"
    )
    loss_weights: tuple[float, ...] | None = option(None, "weight of each --loss_type, in order; none = 1")
    label_smoothing: float = option(
        0.0, "share of pairs expected to be the wrong way round (exo_pair: 0 counts as 0.001)", range=(0, 0.5)
    )
    rpo_alpha: float | None = option(
        None, "dpo: weight of the chosen answer's likelihood; none = off, where ms-swift 3.7 had 1", min=0
    )
    ld_alpha: float | None = option(
        None,
        "dpo: weight of tokens behind the shorter answer's length; none = 1, as all others",
        range=(0, 1),
    )
    discopop_tau: float = option(0.05, "temperature of the blend in the discopop loss")
    reference_free: bool = option(False, "dpo: compare answers as if the reference found all equally likely")
    f_divergence_type: str = option(
        "reverse_kl",
        "dpo: how distance from the reference is measured",
        choices=("reverse_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = option(1.0, "alpha of alpha_divergence; near 0 reverse_kl, 1 forward KL")
    cpo_alpha: float = option(1.0, "cpo, simpo: weight of the chosen likelihood; 0 = published SimPO", min=0)
    simpo_gamma: float = option(1.0, "simpo: margin by which the chosen answer has to win", min=0)
    desirable_weight: float = option(1.0, "kto: weight of answers that are liked", min=0)
    undesirable_weight: float = option(1.0, "kto: weight of answers that are not", min=0)
    center_rewards_coefficient: float | None = option(
        None, "rm: pull of the two rewards' sum towards 0; none = off (0.01 is usual)", min=0
    )
    teacher_model: str | None = option(None, "gkd: model whose distribution is learnt")
    teacher_model_server: str | None = option(
        None, "gkd: http://HOST:PORT of a server of vLLM that has the teacher, with --gkd_logits_topk"
    )
    lmbda: float = option(0.5, "gkd: share of steps that learn from the student's own answers", range=(0, 1))
    gkd_logits_topk: int | None = option(
        None, "gkd: the teacher's most likely tokens that are compared; none = all", min=1
    )
    sft_alpha: float = option(0.0, "gkd: weight of the likelihood of the data's own answers", min=0)
    ref_model: str | None = option(
        None, "reference model; none = the model as it is before training (without its new adapters)"
    )
    ref_adapters: tuple[str, ...] = option((), "adapters of the reference model, checkpoint directories")
    precompute_ref_log_probs: bool = option(False, "run the reference over all rows before training, free it")
    sync_ref_model: bool = option(
        False, "let the reference follow the trained model (--train_type full); checkpoints keep both"
    )
    ref_model_sync_steps: int = option(512, "steps between two updates of the reference", unit="steps", min=1)
    ref_model_mixup_alpha: float = option(0.6, "share of the trained model in an update", range=(0, 1))

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses in use; empty for a method with a single one."""
        return LOSSES[self.rlhf_type][:1] if self.loss_type is None else self.loss_type

    @property
    def beta_value(self) -> float:
        return BETAS.get(self.rlhf_type, 0.1) if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        """Whether batches need the column ref_logps."""
        if self.rlhf_type == "grpo":
            return self.beta_value > 0
        if self.rlhf_type == "ppo":
            return True
        return self.rlhf_type == "kto" or (self.rlhf_type == "dpo" and not self.reference_free)

    def check(self) -> None:
        self._check_losses()
        given = changed(self)
        for name in given:
            refuse_method(self, (name,), self.rlhf_type, METHODS_OF.get(name, RLHF_TYPES))
            losses = [n for n in LOSSES_OF.get(name, self.losses) if n in LOSSES[self.rlhf_type]]
            if self.losses and not set(losses) & set(self.losses):
                raise ConfigError(
                    f"--{name} has no effect with --loss_type {' '.join(self.losses)}",
                    hint=f"it belongs to {', '.join(losses)}",
                )
            if name in REFERENCE_FLAGS and self.reference_free:
                raise Clash(f"--{name} and --reference_free true contradict each other")
        self._check_companions(given)
        if len(self.ref_adapters) > 1:
            raise ConfigError("--ref_adapters takes one checkpoint", hint="merge the others first")

    def _check_losses(self) -> None:
        known, given = LOSSES[self.rlhf_type], self.loss_type or ()
        if given and not known:
            raise ConfigError(f"--rlhf_type {self.rlhf_type} has one loss: leave --loss_type out")
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"--loss_type {name} is not a loss of --rlhf_type {self.rlhf_type}",
                    hint=f"it has {', '.join(known)}",
                )
        if len(set(given)) < len(given):
            raise ConfigError(f"--loss_type names a loss twice: {' '.join(given)}")
        if len(given) > 1 and self.rlhf_type != "dpo":
            raise ConfigError(
                f"--loss_type {' '.join(given)}: only --rlhf_type dpo mixes losses", hint="name one of them"
            )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ConfigError(
                f"--loss_weights has {len(self.loss_weights)} values for {len(self.losses)} in --loss_type",
                hint="give one weight for each loss, in the same order",
            )

    def _check_teacher(self) -> None:
        url = self.teacher_model_server
        if not (self.teacher_model or url):
            raise ConfigError(
                "--rlhf_type gkd needs --teacher_model", hint="a larger model of the same tokenizer"
            )
        if self.teacher_model and url:
            raise ConfigError("--teacher_model and --teacher_model_server name two", hint="leave one out")
        if url and not url.startswith("http://"):
            raise ConfigError(f"--teacher_model_server {url} is no http://HOST:PORT", hint="one server alone")
        if url and not self.gkd_logits_topk:
            raise ConfigError(
                "--teacher_model_server needs --gkd_logits_topk: a server tells its most likely tokens alone",
                hint="20 is what vLLM allows unless it is started with more",
            )
        if self.beta is not None and self.beta > 1:
            raise ConfigError(f"--beta must be from 0 to 1 with --rlhf_type gkd, got {self.beta:g}")

    def _check_companions(self, given: list[str]) -> None:
        """Values and pairs of flags that make no sense together."""
        if self.rlhf_type == "gkd":
            self._check_teacher()
        if self.beta == 0 and self.rlhf_type not in ("grpo", "gkd"):
            raise ConfigError("--beta must be above 0, got 0", hint="0.1 is usual")
        if self.label_smoothing == 0.5 and "robust" in self.losses:
            raise ConfigError(
                "--label_smoothing 0.5 makes the robust loss infinite", hint="give less than 0.5"
            )
        if self.discopop_tau <= 0:
            raise ConfigError(f"--discopop_tau must be above 0, got {self.discopop_tau}")
        if "f_alpha_divergence_coef" in given and self.f_divergence_type != "alpha_divergence":
            raise ConfigError("--f_alpha_divergence_coef needs --f_divergence_type alpha_divergence")
        if self.f_alpha_divergence_coef == 0:
            raise ConfigError(
                "--f_alpha_divergence_coef 0 is the reverse KL", hint="use --f_divergence_type reverse_kl"
            )
        if not self.sync_ref_model:
            refuse(self, ("ref_model_sync_steps", "ref_model_mixup_alpha"), "without --sync_ref_model true")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigError(
                "--sync_ref_model and --precompute_ref_log_probs contradict each other",
                hint="a reference that changes cannot be run beforehand; leave one of them out",
            )
