"""`swift sft`: config -> rows -> engine -> loop. What can be refused is, before weights load."""

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from swift import __version__
from swift.config.option import ConfigError, flatten
from swift.config.runs import SftRun
from swift.data.audit import audit
from swift.data.cache import encode_cached, join_datasets, open_exported, remember
from swift.data.datasets import use_plugins
from swift.data.encode import EncodedDataset
from swift.data.loader import StepPlan
from swift.data.pack import pack_lengths
from swift.data.rows import Rows
from swift.data.sources import open_sets
from swift.engines.ranks import Ranks, join_ranks, leave_ranks
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora
from swift.models.hub import resolve_model
from swift.models.load import context_length, load_config, load_model, load_tokenizer, pick_device
from swift.objectives.sft import Sft
from swift.template.chat import ChatTemplate
from swift.template.loss_scale import build_weights
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
    use_plugins(run.plugins)
    build_weights(run.template.loss_scale)  # a wrong name is told before anything is downloaded
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
    train_rows, eval_source = open_sources(run)
    longest = run.template.max_length or context_length(load_config(model_path)) or 2048
    longest = min(longest, run.data.packing_length or longest)
    template = ChatTemplate(tokenizer, run.template)
    run = with_system(run, template.system)
    tokenizer.chat_template = tokenizer.chat_template or template.source  # saved with every checkpoint
    rows, eval_rows = encode(run, template, train_rows, eval_source, longest)
    ranks, device = join_ranks(pick_device(run.model.device), run.parallel.ddp_timeout)
    plan = plan_steps(run, rows, longest, ranks, resumption)
    data = {
        "rows": len(rows),
        "rows_per_step": plan.items_per_step,
        "tokens": rows.num_tokens,
        "fingerprint": rows.fingerprint,
        "packs": plan.packs and plan.packs.fingerprint,
    }
    check_equal_on_ranks(ranks, data)
    if resumption:
        check_same_data(resumption, data)
    total_steps = plan.total_steps(run.schedule.num_train_epochs, run.schedule.max_steps)
    engine = build_engine(run, model_path, total_steps, ranks, device, resumption)
    dtype = str(engine.dtype).removeprefix("torch.")
    summary.tell_weights(engine.model, f"{run.model.model}, {run.tuner.train_type}, {dtype}, {engine.device}")
    if plan.packs:
        summary.tell_packs(plan.packs, flat=engine.flat)
    summary.tell_steps(plan, total_steps, rows)
    summary.tell_sample(tokenizer, rows)
    directory = ranks.share(open_run_directory(run, root, resumption) if ranks.is_main else root)
    args = hide_secrets({**flatten(run), "swift_version": __version__, "command": "sft"})
    if ranks.is_main:
        write_json(directory / "args.json", args)
        if eval_source is not None and not run.data.val_dataset and not resumption:
            append_jsonl(directory / "val_dataset.jsonl", (row.columns for row in eval_source))
    saver = Saver(
        directory, tokenizer, args, data,
        only_model=run.schedule.save_only_model,
        total_limit=run.schedule.save_total_limit,
        symlinks=run.output.create_checkpoint_symlink,
        ranks=ranks,
    )  # fmt: skip
    state = resumption.state if resumption else TrainState()
    loop = Offline(
        engine=engine, objective=Sft(), rows=rows, eval_rows=eval_rows, plan=plan, total_steps=total_steps,
        schedule=run.schedule, saver=saver, run_directory=directory,
        callbacks=build_callbacks(run, directory) if ranks.is_main else [],
    )  # fmt: skip
    code = run_loop(loop, state)
    leave_ranks()
    return code


def check_equal_on_ranks(ranks: Ranks, data: dict[str, Any]) -> None:
    """Raises ConfigError where a process has read other rows than the first one, as on disks that differ."""
    first = ranks.share(data)
    if data != first:
        raise ConfigError(
            f"process {ranks.rank} has other training data than process 0: {data} instead of {first}",
            hint="give every node the same files",
        )


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


def open_sources(run: SftRun) -> tuple[Rows | None, Rows | None]:
    """Training and evaluation rows."""
    return open_sets(run.data, seed=run.data_seed, use_hf=run.model.use_hf, token=run.model.hub_token)


def encode(
    run: SftRun, template: ChatTemplate, train: Rows | None, evaluation: Rows | None, max_length: int
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Tokens of both sets, with what was dropped and why."""
    encoded = []
    for what, rows in (("training", train), ("evaluation", evaluation)):
        found = open_exported(
            run.data.cached_dataset, template, run.template,
            model=str(run.model.model), max_length=max_length, training=what == "training",
        )  # fmt: skip
        if rows is not None:
            dataset, report = encode_cached(
                rows, template, config=run.data, template_config=run.template, max_length=max_length,
                what=what, plugins=run.plugins.external_plugins,
            )  # fmt: skip
            summary.tell_drops(report, what)
            found.insert(0, dataset)
        if not found:
            encoded.append(None)
            continue
        dataset = join_datasets(found)
        summary.tell_rows(dataset, what)
        if what == "training":
            for line in remember(dataset, "audit", partial(audit, dataset, template.stop_token_ids)):
                warn(line)
        encoded.append(dataset)
    assert encoded[0] is not None, "a run has --dataset or --cached_dataset"
    return encoded[0], encoded[1]


def plan_steps(
    run: SftRun, rows: EncodedDataset, longest: int, ranks: Ranks, resumption: Resumption | None
) -> StepPlan:
    """How rows, or packs of them, make up steps. `longest`: the tokens of a row that may not be exceeded."""
    size = run.schedule.per_device_train_batch_size
    accumulation = run.schedule.gradient_accumulation_steps or math.ceil(ROWS_PER_STEP / size / ranks.world)
    if resumption:
        accumulation = keep_step_size(resumption.data["rows_per_step"], size, ranks.world)
    packs = pack_lengths(rows.lengths, run.data.packing_length or longest) if run.data.packing else None
    return StepPlan(
        len(rows), size, accumulation, ranks.world, seed=run.data_seed,
        shuffle=run.data.train_dataloader_shuffle, packs=packs,
    )  # fmt: skip


def keep_step_size(rows_per_step: int, micro_batch_size: int, processes: int) -> int:
    """The accumulation that gives a resumed run its old steps, however many processes it has now."""
    accumulation, rest = divmod(rows_per_step, micro_batch_size * processes)
    if rest:
        raise ConfigError(
            f"--per_device_train_batch_size {micro_batch_size} on {processes} process(es) cannot make up the "
            f"checkpoint's {rows_per_step} rows a step",
            hint="take a size that divides them",
        )
    return accumulation


def build_engine(
    run: SftRun,
    model_path: Path,
    total_steps: int,
    ranks: Ranks,
    device: torch.device,
    resumption: Resumption | None,
) -> TransformersEngine:
    """Seeds everything, loads the weights, adds adapters. Each rank draws dropout of its own."""
    seed = run.schedule.seed + ranks.rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
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
        resume_from=resumption.checkpoint if resumption else None,
    )


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
