"""The parts of a run, built from its config: engine, run directory, callbacks."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import enable_full_determinism

from swift.config.online import SAMPLES
from swift.config.option import ConfigError
from swift.config.runs import RlhfRun, SftRun, TrainRun
from swift.engines.ranks import Ranks
from swift.engines.transformers.checkpoint import REFERENCE
from swift.engines.transformers.engine import TransformersEngine
from swift.engines.transformers.forward import check_sequence_parallel
from swift.engines.transformers.wrap import Wrapper, load_zero, wrap
from swift.models.adapters import add_lora, describe_adapters, load_adapter, merge, set_up
from swift.models.freezing import freeze
from swift.models.heads import load_scoring_model, verdict_tokens
from swift.models.load import load_model
from swift.plugins.callbacks import Callback
from swift.train.callbacks import EarlyStop, Screen
from swift.train.health import Health
from swift.train.hf_callbacks import HfCallbacks
from swift.train.preparing import Prepared
from swift.train.profiling import Profiler
from swift.train.resume import Resumption
from swift.train.rundir import new_run_directory
from swift.train.saving import remove_partial
from swift.train.trackers import JsonlTracker, Plotter
from swift.train.tracking import TrackedRun, Tracking, load_trackers
from swift.utils.log import say


def build_engine(
    ready: Prepared, ranks: Ranks, device: torch.device, total_steps: int, accumulation: int
) -> TransformersEngine:
    """Seeds everything, loads the weights, adds adapters. Each rank draws dropout of its own."""
    run, method, resumption = ready.run, ready.method, ready.resumption
    check_sequence_parallel(ready.model_config, ranks.sequence_size)
    verdict = verdict_tokens(ready.tokenizer) if method.answers_yes else None
    wrapper = choose_wrapper(run, ranks, accumulation, ready.model_config.get_text_config().hidden_size)
    for flag in ("activation_cpu_offload", "tf32"):
        if getattr(run.schedule, flag) and device.type != "cuda":
            raise ConfigError(f"--{flag} true needs a GPU", hint="leave it out")
    if run.schedule.tf32:
        torch.set_float32_matmul_precision("high")
    seed_everything(run.schedule.seed + ranks.rank)
    if run.schedule.full_determinism:
        enable_full_determinism(run.schedule.seed + ranks.rank)
    loading = {
        "dtype": run.model.torch_dtype,
        "attention": run.model.attn_impl,
        "device": device,
        "quant": run.quant,
    }
    if method.num_labels is None:
        model = load_model(ready.model_path, **loading)
    else:
        model = load_scoring_model(
            ready.model_path, ready.tokenizer, num_labels=method.num_labels, seed=run.schedule.seed,
            problem=run.task.problem_type if isinstance(run, SftRun) else None, **loading,
        )  # fmt: skip
    model = choose_weights(model, run, resumption)
    frozen = None
    beside = run.tuner.train_type == "full" or ready.reference_adapter or method.teaches
    if method.needs_reference and beside:
        kept = resumption.checkpoint / REFERENCE if resumption and method.mix_every else None
        frozen = load_model(kept or ready.reference_path or ready.model_path, **loading)
        if ready.reference_adapter and not kept:
            frozen = merge(load_adapter(frozen, ready.reference_adapter, trainable=False))
    checkpointing = run.schedule.gradient_checkpointing
    return TransformersEngine(
        model,
        run.optim,
        learning_rate=run.optim.peak(run.tuner.train_type),
        total_steps=total_steps,
        flat=run.schedule.padding_free,
        own_attention=(
            ranks.sequence_size > 1 or run.model.attn_impl is None or lacks_flash(run.model.attn_impl, model)
        ),
        gradient_checkpointing=device.type == "cuda" if checkpointing is None else checkpointing,
        activation_cpu_offload=run.schedule.activation_cpu_offload,
        compiler=run.schedule.torch_compile_backend if run.schedule.torch_compile else None,
        compute=getattr(torch, run.schedule.compute or "", None) if model.dtype == torch.float32 else None,
        ranks=ranks,
        noise_alpha=run.sft.neftune_noise_alpha if isinstance(run, SftRun) else None,
        wrapper=wrapper,
        resume_from=resumption.checkpoint if resumption else None,
        frozen=frozen,
        frozen_moves=method.mix_every is not None,
        temperature=run.online.temperature if isinstance(run, RlhfRun) and method.samples else 1.0,
        verdict=verdict,
    )


def choose_weights(
    model: PreTrainedModel, run: TrainRun, resumption: Resumption | None
) -> PreTrainedModel | PeftModel:
    """The model with its trained weights chosen: adapters added, or the rest frozen."""
    if run.tuner.train_type == "full":
        freeze(model, run.tuner)
        return model
    if run.tuner.adapters:
        # A resumed run may not find the adapters that it started from: the checkpoint has the same kind.
        source = resumption.checkpoint if resumption else Path(run.tuner.adapters[0]).expanduser()
        adapted = set_up(load_adapter(model, source, trainable=True), run.tuner)
    else:
        adapted = add_lora(model, run.tuner, seed=run.schedule.seed, resumed=resumption is not None)
    say(f"adapters: {describe_adapters(adapted)}")
    return adapted


def choose_wrapper(run: TrainRun, ranks: Ranks, accumulation: int, width: int) -> Wrapper:
    """What spreads the model: torch's own wrappers, or DeepSpeed with its config settled."""
    text = run.parallel.zero
    if text is None:
        return partial(wrap, parallel=run.parallel)
    zero = load_zero()
    config = zero.settle(
        text,
        micro_batch=run.schedule.per_device_train_batch_size,
        accumulation=accumulation,
        data_world=ranks.data_world,
        clip=run.optim.max_grad_norm,
        compute=run.schedule.compute or run.model.torch_dtype,
        width=width,
    )
    return partial(zero.wrap_zero, config=config)


def seed_everything(seed: int) -> None:
    """Every generator that training may draw from, of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def lacks_flash(name: str, model: PreTrainedModel | PeftModel) -> bool:
    """Whether flash attention was asked for and is not there: our own kernel does what it would have done."""
    return name.startswith("flash") and model.config._attn_implementation == "sdpa"


def open_run_directory(run: TrainRun, root: Path, resumption: Resumption | None) -> Path:
    """The checkpoint's own run directory when resuming into the same place, else a new one."""
    if resumption and (run.output.output_dir is None or root in resumption.checkpoint.parents):
        for name in remove_partial(resumption.run_directory):
            say(f"removed {name}: it was half-written when the run was killed")
        return resumption.run_directory
    return new_run_directory(root, run.output.add_version)


def build_callbacks(
    run: TrainRun, directory: Path, flags: dict[str, Any], own: Sequence[Callback | TrainerCallback]
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
    if isinstance(run, RlhfRun) and run.rlhf.rlhf_type in SAMPLES:
        callbacks.append(Health())
    if run.output.profiled:
        callbacks.append(Profiler(directory / "profile", run.output.profiled))
    pictures = [] if run.output.report_to == ("none",) else [Plotter(directory)]
    return [*callbacks, *pictures, Screen(bar=not schedule.disable_tqdm)]
