"""The parts of a run, built from its config: engine, run directory, callbacks."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from swift.config.option import ConfigError
from swift.config.runs import SftRun
from swift.data.channels import find_channels
from swift.data.encode import EncodedDataset
from swift.engines.ranks import Ranks
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora
from swift.models.load import load_model
from swift.objectives.sft import Sft
from swift.plugins.callbacks import Callback, callbacks_map, extra_callbacks
from swift.train.callbacks import EarlyStop, Screen
from swift.train.hf_callbacks import HfCallbacks, check_hf_callback
from swift.train.profiling import Profiler
from swift.train.resume import Resumption
from swift.train.rundir import new_run_directory
from swift.train.saving import remove_partial
from swift.train.trackers import JsonlTracker, Plotter
from swift.train.tracking import TrackedRun, Tracking, load_trackers
from swift.utils.log import say, warn


def build_engine(
    run: SftRun,
    model_path: Path,
    total_steps: int,
    ranks: Ranks,
    device: torch.device,
    resumption: Resumption | None,
) -> TransformersEngine:
    """Seeds everything, loads the weights, adds adapters. Each rank draws dropout of its own."""
    seed_everything(run.schedule.seed + ranks.rank)
    if device.type == "cuda" and torch.cuda.device_count() > 1 and ranks.world == 1:
        warn(f"{torch.cuda.device_count()} GPUs are visible; NPROC_PER_NODE says how many are used")
    model = load_model(model_path, dtype=run.model.torch_dtype, attention=run.model.attn_impl, device=device)
    if run.tuner.train_type == "lora":
        model = add_lora(model, run.tuner, seed=run.schedule.seed)
    learning_rate = run.optim.learning_rate
    if learning_rate is None:
        learning_rate = 1e-4 if run.tuner.train_type == "lora" else 1e-5
    checkpointing = run.schedule.gradient_checkpointing
    return TransformersEngine(
        model,
        run.optim,
        learning_rate=learning_rate,
        total_steps=total_steps,
        flat=run.schedule.padding_free,
        own_attention=run.model.attn_impl is None or lacks_flash(run.model.attn_impl, model),
        gradient_checkpointing=device.type == "cuda" if checkpointing is None else checkpointing,
        ranks=ranks,
        fsdp=run.parallel.fsdp is not None and ranks.world > 1,
        noise_alpha=run.objective.neftune_noise_alpha,
        resume_from=resumption.checkpoint if resumption else None,
    )


def build_objective(
    run: SftRun, config: PretrainedConfig, rows: EncodedDataset, eval_rows: EncodedDataset | None
) -> Sft:
    """The loss of a run. Raises ConfigError where model or rows have not what it needs."""
    experts = getattr(config.get_text_config(), "num_experts_per_tok", None)
    if run.objective.router_aux_loss_coef and not (experts and hasattr(config, "output_router_logits")):
        raise ConfigError(
            f"--router_aux_loss_coef {run.objective.router_aux_loss_coef:g}: a {config.model_type} model "
            "gives out no choices of experts to balance",
            hint="leave it out",
        )
    channels = ()
    if run.objective.enable_channel_loss:
        channels = find_channels([rows, *([] if eval_rows is None else [eval_rows])])
    return Sft(run.objective, channels, experts or 0)


def seed_everything(seed: int) -> None:
    """Every generator that training may draw from, of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def lacks_flash(name: str, model: PreTrainedModel | PeftModel) -> bool:
    """Whether flash attention was asked for and is not there: our own kernel does what it would have done."""
    return name.startswith("flash") and model.config._attn_implementation == "sdpa"


def open_run_directory(run: SftRun, root: Path, resumption: Resumption | None) -> Path:
    """The checkpoint's own run directory when resuming into the same place, else a new one."""
    if resumption and (run.output.output_dir is None or root in resumption.checkpoint.parents):
        removed = remove_partial(resumption.run_directory)
        for name in removed:
            say(f"removed {name}: it was half-written when the run was killed")
        return resumption.run_directory
    return new_run_directory(root, run.output.add_version)


def find_callbacks(run: SftRun) -> list[Any]:
    """The users' own, by --callbacks and from `extra_callbacks`. Raises ConfigError."""
    named = [callbacks_map.find(name) for name in run.output.callbacks]
    found = [value() if isinstance(value, type) else value for value in (*named, *extra_callbacks)]
    for callback in found:
        if isinstance(callback, TrainerCallback):
            check_hf_callback(callback)
        elif not isinstance(callback, Callback):
            raise ConfigError(
                f"{type(callback).__name__} is not a callback", hint="derive it from swift.plugin.Callback"
            )
    return found


def build_callbacks(
    run: SftRun, directory: Path, flags: dict[str, Any], own: Sequence[Any]
) -> list[Callback]:
    """Those of one process: the first one's. `flags`: the run's, without secrets; `own`: the users'."""
    log = JsonlTracker(directory)
    about = TrackedRun(directory, run.output, flags)
    callbacks: list[Callback] = [log, *(Tracking(t, about) for t in load_trackers(run.output.report_to))]
    callbacks += [callback for callback in own if isinstance(callback, Callback)]
    if theirs := [callback for callback in own if isinstance(callback, TrainerCallback)]:
        callbacks.append(HfCallbacks(theirs, flags))
    schedule = run.schedule
    if schedule.early_stop_interval:
        callbacks.append(
            EarlyStop(
                log.path,
                metric=schedule.best_metric,
                lower_is_better=schedule.lower_is_better,
                patience=schedule.early_stop_interval,
            )
        )
    if run.output.profiled:
        callbacks.append(Profiler(directory / "profile", run.output.profiled))
    return [*callbacks, Plotter(directory), Screen()]
