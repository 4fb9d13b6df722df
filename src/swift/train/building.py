"""The parts of a run, built from its config: engine, run directory, callbacks."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from swift.config.option import ConfigError
from swift.config.runs import SftRun
from swift.engines.ranks import Ranks
from swift.engines.transformers.engine import TransformersEngine
from swift.engines.transformers.forward import check_sequence_parallel
from swift.engines.transformers.wrap import Wrapper, load_zero, wrap
from swift.models.adapters import add_lora
from swift.models.load import load_config, load_model
from swift.train.callbacks import Callback, Screen
from swift.train.resume import Resumption
from swift.train.rundir import new_run_directory
from swift.train.saving import remove_partial
from swift.train.trackers import JsonlTracker, Plotter, TensorBoardTracker
from swift.utils.log import say


def build_engine(
    run: SftRun,
    model_path: Path,
    total_steps: int,
    ranks: Ranks,
    device: torch.device,
    resumption: Resumption | None,
    accumulation: int,
) -> TransformersEngine:
    """Seeds everything, loads the weights, adds adapters. Each rank draws dropout of its own."""
    config = load_config(model_path)
    check_sequence_parallel(config, ranks.sequence_size)
    wrapper = choose_wrapper(run, ranks, accumulation, config.get_text_config().hidden_size)
    if run.schedule.activation_cpu_offload and device.type != "cuda":
        raise ConfigError("--activation_cpu_offload true needs a GPU to take activations from")
    seed_everything(run.schedule.seed + ranks.rank)
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
        own_attention=(
            ranks.sequence_size > 1 or run.model.attn_impl is None or lacks_flash(run.model.attn_impl, model)
        ),
        gradient_checkpointing=device.type == "cuda" if checkpointing is None else checkpointing,
        activation_cpu_offload=run.schedule.activation_cpu_offload,
        compute=getattr(torch, run.schedule.compute or "", None) if model.dtype == torch.float32 else None,
        ranks=ranks,
        wrapper=wrapper,
        resume_from=resumption.checkpoint if resumption else None,
    )


def choose_wrapper(run: SftRun, ranks: Ranks, accumulation: int, width: int) -> Wrapper:
    """What spreads the model: torch's own wrappers, or DeepSpeed with its config settled."""
    text = run.parallel.deepspeed
    if text in (None, "zero0"):  # stage 0 slices nothing, which is what DDP does
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


def open_run_directory(run: SftRun, root: Path, resumption: Resumption | None) -> Path:
    """The checkpoint's own run directory when resuming into the same place, else a new one."""
    if resumption and (run.output.output_dir is None or root in resumption.checkpoint.parents):
        removed = remove_partial(resumption.run_directory)
        for name in removed:
            say(f"removed {name}: it was half-written when the run was killed")
        return resumption.run_directory
    return new_run_directory(root, run.output.add_version)


def build_callbacks(run: SftRun, directory: Path) -> list[Callback]:
    callbacks: list[Callback] = [JsonlTracker(directory)]
    if "tensorboard" in run.output.report_to:
        logging_dir = run.output.logging_dir
        callbacks.append(TensorBoardTracker(Path(logging_dir) if logging_dir else directory / "runs"))
    return [*callbacks, Plotter(directory), Screen()]
