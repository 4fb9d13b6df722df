"""`swift sft`: config -> rows -> engine -> loop. What can be refused is, before weights load."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift import __version__
from swift.config.option import ConfigError, flatten
from swift.config.runs import SftRun
from swift.data.encode import EncodedDataset, encode_rows
from swift.data.loader import StepPlan
from swift.data.sources import load_rows, split_rows
from swift.data.types import Row
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora
from swift.models.hub import resolve_model
from swift.models.load import context_length, load_config, load_model, load_tokenizer, pick_device
from swift.objectives.sft import Sft
from swift.template.chat import ChatTemplate
from swift.train import summary
from swift.train.callbacks import Callback, Screen
from swift.train.offline import Offline
from swift.train.resume import (
    Resumption,
    check_same_data,
    hide_secrets,
    load_resumption,
    with_model,
    with_system,
)
from swift.train.rundir import check_writable, new_run_directory, output_root
from swift.train.saving import Saver, remove_partial
from swift.train.state import TrainState
from swift.train.trackers import JsonlTracker, Plotter, TensorBoardTracker
from swift.utils.files import append_jsonl, write_json
from swift.utils.log import say, warn

ROWS_PER_STEP = 16  # what --gradient_accumulation_steps aims at when it is not given


def run_sft(run: SftRun) -> int:
    """Trains as `run` says; returns the exit code."""
    run, resumption = load_resumption(run)
    if run.model.torch_dtype == "float16":
        raise ConfigError("--torch_dtype float16 cannot train yet", hint="use bfloat16 or float32")
    assert run.model.model is not None
    root = output_root(run.output, run.model.model)
    check_writable(root)
    model_path = resolve_model(
        run.model.model, use_hf=run.model.use_hf, revision=run.model.model_revision, token=run.model.hub_token
    )
    if Path(run.model.model).is_dir():
        run = with_model(run, str(model_path))
    tokenizer = load_tokenizer(model_path)
    train_rows, eval_source = load_sources(run)
    longest = run.template.max_length or context_length(load_config(model_path)) or 2048
    template = ChatTemplate(tokenizer, run.template)
    run = with_system(run, template.system)
    tokenizer.chat_template = tokenizer.chat_template or template.source  # saved with every checkpoint
    rows, eval_rows = encode(run, template, train_rows, eval_source, longest)
    data = {"rows": len(rows), "tokens": rows.num_tokens, "fingerprint": rows.fingerprint}
    if resumption:
        check_same_data(resumption, data)
    plan = plan_steps(run, len(rows))
    total_steps = plan.total_steps(run.schedule.num_train_epochs, run.schedule.max_steps)
    engine = build_engine(run, model_path, total_steps)
    dtype = str(engine.dtype).removeprefix("torch.")
    summary.tell_weights(engine.model, f"{run.model.model}, {run.tuner.train_type}, {dtype}, {engine.device}")
    summary.tell_steps(plan, total_steps, rows)
    summary.tell_sample(tokenizer, rows)
    directory = open_run_directory(run, root, resumption)
    args = hide_secrets({**flatten(run), "swift_version": __version__, "command": "sft"})
    write_json(directory / "args.json", args)
    if eval_rows and not run.data.val_dataset and not resumption:
        append_jsonl(directory / "val_dataset.jsonl", [r.columns for r in eval_source])
    saver = Saver(
        directory, tokenizer, args, data,
        only_model=run.schedule.save_only_model,
        total_limit=run.schedule.save_total_limit,
        symlinks=run.output.create_checkpoint_symlink,
    )  # fmt: skip
    state = resumption.state if resumption else TrainState()
    if resumption:
        engine.load(resumption.checkpoint)
    loop = Offline(
        engine=engine, objective=Sft(), rows=rows, eval_rows=eval_rows, plan=plan, total_steps=total_steps,
        schedule=run.schedule, saver=saver, callbacks=build_callbacks(run, directory),
        run_directory=directory,
    )  # fmt: skip
    return run_loop(loop, state)


def run_loop(loop: Offline, state: TrainState) -> int:
    """Trains; an interrupt says how to go on."""
    directory = loop.run_directory
    try:
        loop.run(state)
    except KeyboardInterrupt:
        if state.last_saved_step is None:
            say(f"interrupted at step {state.step}; no checkpoint was due yet (--save_steps)")
        else:
            say(f"interrupted at step {state.step}; go on with --resume_from_checkpoint {directory}")
        return 130
    for what, step in (
        ("last_model_checkpoint", state.last_saved_step),
        ("best_model_checkpoint", state.best_step),
    ):
        if step is not None:
            say(f"{what}: {directory / f'checkpoint-{step}'}")
    say(f"images_dir: {directory / 'images'}")
    return 0


def load_sources(run: SftRun) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows."""
    data = run.data
    seed = run.schedule.seed if data.data_seed is None else data.data_seed
    options: dict[str, Any] = {
        "seed": seed,
        "columns": data.columns,
        "model_name": data.model_name,
        "model_author": data.model_author,
        "use_hf": run.model.use_hf,
        "token": run.model.hub_token,
    }
    rows = load_rows(data.dataset, shuffle=data.dataset_shuffle, **options)
    if data.val_dataset:
        return rows, load_rows(data.val_dataset, shuffle=data.val_dataset_shuffle, **options)
    return split_rows(rows, data.split_dataset_ratio, seed)


def encode(
    run: SftRun, template: ChatTemplate, train: list[Row], evaluation: list[Row], max_length: int
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Tokens of both sets, with what was dropped and why."""
    encoded = []
    for what, rows in (("training", train), ("evaluation", evaluation)):
        if not rows:
            encoded.append(None)
            continue
        dataset, report = encode_rows(
            rows, template, config=run.data, template_config=run.template, max_length=max_length, what=what
        )
        summary.tell_drops(report, what)
        summary.tell_rows(dataset, what)
        encoded.append(dataset)
    assert encoded[0] is not None, "load_rows never returns an empty list"
    return encoded[0], encoded[1]


def plan_steps(run: SftRun, num_rows: int) -> StepPlan:
    size = run.schedule.per_device_train_batch_size
    accumulation = run.schedule.gradient_accumulation_steps or math.ceil(ROWS_PER_STEP / size)
    seed = run.schedule.seed if run.data.data_seed is None else run.data.data_seed
    return StepPlan(num_rows, size, accumulation, seed=seed, shuffle=run.data.train_dataloader_shuffle)


def build_engine(run: SftRun, model_path: Path, total_steps: int) -> TransformersEngine:
    """Seeds everything, loads the weights, adds adapters."""
    random.seed(run.schedule.seed)
    np.random.seed(run.schedule.seed % 2**32)
    torch.manual_seed(run.schedule.seed)
    device = pick_device(run.model.device)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        warn(f"{torch.cuda.device_count()} GPUs are visible; this version trains on {device} alone")
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
        own_attention=run.model.attn_impl is None,
        gradient_checkpointing=device.type == "cuda" if checkpointing is None else checkpointing,
    )


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
