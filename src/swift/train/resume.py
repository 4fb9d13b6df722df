"""Going on from a checkpoint: the flags it was trained with, and the checks that it is the same run."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from swift.config.layout import LayoutConfig, keeps_layout
from swift.config.option import ConfigError, build, flatten, is_secret, iterate_knobs
from swift.config.runs import TrainRun
from swift.models.directory import read_json
from swift.train.saving import ARGS, STATE, find_checkpoint
from swift.train.state import TrainState
from swift.utils import env
from swift.utils.log import say

# Flags whose change would make the run another run; the others may differ (how often to log).
FIXED = (
    "model", "dataset", "train_type", "lora_rank", "lora_alpha", "target_modules", "max_length", "system",
    "seed", "data_seed", "loss_scale",
    "lr_scheduler_type", "learning_rate", "train_dataloader_shuffle", "packing", "packing_length",
    "streaming", "shuffle_buffer_size", "dataloader_drop_last",
    "agent_template", "is_binary_loss_scale", "use_chat_template", "enable_dft_loss",
    "label_smoothing_factor", "router_aux_loss_coef", "neftune_noise_alpha",
    "rlhf_type", "beta", "loss_type", "loss_weights", "ref_model", "label_smoothing", "rpo_alpha",
    "sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha",
    "use_rslora", "use_dora", "init_weights", "lora_bias", "modules_to_save",
    "target_regex", "target_parameters",
    "freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio",
    "trainable_parameters", "trainable_parameters_regex",
    "optim", "optimizer", "lorap_lr_ratio", "lr_scheduler_kwargs", "min_lr",
    "global_batch_size", "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "quant_method", "quant_bits", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
)  # fmt: skip

Run = TypeVar("Run", bound=TrainRun)


@dataclass(frozen=True)
class Resumption:
    """Where to go on."""

    checkpoint: Path
    state: TrainState
    data: dict[str, Any]

    @property
    def run_directory(self) -> Path:
        return self.checkpoint.parent


def load_resumption(run: Run) -> tuple[Run, Resumption | None]:
    """Finds and verifies --resume_from_checkpoint. Flags left at their defaults take its values."""
    if not run.schedule.resume_from_checkpoint:
        return run, None
    checkpoint = find_checkpoint(Path(run.schedule.resume_from_checkpoint).expanduser())
    saved = read_json(checkpoint / ARGS)
    content = read_json(checkpoint / STATE)
    given = flatten(run)
    values: dict[str, Any] = {}
    anew = _new_layout(run, given, saved)
    for knob in iterate_knobs(type(run)):
        default = list(knob.default) if isinstance(knob.default, tuple) else knob.default
        inherits = given[knob.name] == default and knob.name in saved and knob.name not in anew
        value = saved[knob.name] if inherits else given[knob.name]
        values[knob.name] = tuple(value) if isinstance(value, list) else value
        if knob.name in FIXED and knob.name in saved and value != saved[knob.name]:
            raise ConfigError(
                f"--{knob.name} {value} differs from the checkpoint's {saved[knob.name]}",
                hint="leave the flag out to go on, or start a new run without --resume_from_checkpoint",
            )
    values["resume_from_checkpoint"] = str(checkpoint)
    resumed = build(type(run), values)
    resumed.check_complete()
    state = TrainState.from_dict(content["state"])
    say(f"resuming from {checkpoint} after step {state.step}; flags that were not given are taken from it")
    return resumed, Resumption(checkpoint, state, content["data"])


def _new_layout(run: TrainRun, given: dict[str, Any], saved: dict[str, Any]) -> frozenset[str]:
    """The flags of the layout where it is another one: it is taken as a whole or not at all."""
    names = frozenset(field.name for field in fields(LayoutConfig))
    if not names <= given.keys() & saved.keys():
        return frozenset()
    if keeps_layout(run.given, saved, int(env.read("WORLD_SIZE", "1") or 1)):
        return frozenset()
    say("processes share the model in another way than before: these flags are not taken from the checkpoint")
    return names


def check_same_data(resumption: Resumption, data: dict[str, Any]) -> None:
    """Raises ConfigError when the rows, once encoded, are not those of the checkpoint."""
    for name, before in resumption.data.items():
        if data.get(name) != before:
            raise ConfigError(
                f"the training data differs from the checkpoint's: {name} was {before}, now {data.get(name)}",
                hint="restore the dataset files, --model and the flags that choose or cut rows",
            )


def hide_secrets(flat: dict[str, Any]) -> dict[str, Any]:
    """Flags as they may be written to a file."""
    return {k: (None if is_secret(k) else v) for k, v in flat.items()}
