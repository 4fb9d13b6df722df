"""A training run: config -> rows -> engine -> loop. What can be refused is, before weights load."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from swift import __version__
from swift.config.option import flatten
from swift.config.runs import RlhfRun, SftRun, TrainRun
from swift.engines.protocol import Engine
from swift.engines.ranks import Ranks, join_ranks, leave_ranks
from swift.models.directory import describe_weights, list_checkpoints
from swift.models.load import pick_device
from swift.models.push import check_destination
from swift.train import summary
from swift.train.actor_critic import build_engines
from swift.train.building import build_callbacks, open_run_directory
from swift.train.distill import DistillStage
from swift.train.loop import Loop
from swift.train.method import Method, rlhf_method, sft_method
from swift.train.preparing import Locate, Prepared, check_equal_on_ranks, locate_model, prepare
from swift.train.publishing import Publisher
from swift.train.resume import check_same_data, hide_secrets, load_resumption
from swift.train.run_online import OnlineStage
from swift.train.saving import Saver
from swift.train.scoring import precompute_reference
from swift.train.stage import RowStage
from swift.train.state import TrainState
from swift.train.stopping import Terminated, heed_signals
from swift.utils.files import append_jsonl, write_json
from swift.utils.log import say, warn

Run = TypeVar("Run", bound=TrainRun)


@dataclass(frozen=True)
class Backend:
    """What engines do differently before the loop."""

    settle: Callable[[Any], Any]  # a run, once it is whole
    locate: Locate
    join: Callable[[Prepared], tuple[Ranks, torch.device]]
    build: Callable[[Prepared, Ranks, torch.device, int, int], Engine]  # steps in all, accumulation
    iterations: bool = False  # whether checkpoints have a part for Megatron's tools
    # After the last step, in one process, with the last checkpoint.
    finish: Callable[[Any, Path], None] = lambda _run, _checkpoint: None


def join_data_parallel(ready: Prepared) -> tuple[Ranks, torch.device]:
    """Every process has rows of its own, or shares those of its sequence group."""
    run = ready.run
    return join_ranks(
        pick_device(run.model.device),
        run.parallel.ddp_timeout,
        sequence_size=run.parallel.sequence_parallel_size,
        backend=run.parallel.ddp_backend,
    )


TRANSFORMERS = Backend(lambda run: run, locate_model, join_data_parallel, build_engines)


def run_pt(run: SftRun) -> int:
    return train(run, "pt", sft_method)


def run_sft(run: SftRun) -> int:
    return train(run, "sft", sft_method)


def run_rlhf(run: RlhfRun) -> int:
    return train(run, "rlhf", rlhf_method)


def train(
    run: Run, command: str, build_method: Callable[[Run], Method], backend: Backend = TRANSFORMERS
) -> int:
    """Trains as `run` says; returns the exit code."""
    # The engine is gone when this returns: wrappers that outlive their process group may wait for it forever.
    code = _train(run, command, build_method, backend)
    leave_ranks()
    return code


def _train(run: Run, command: str, build_method: Callable[[Run], Method], backend: Backend) -> int:
    """`train`, with the processes of the job still together at the end."""
    run, resumption = load_resumption(run)
    method = build_method(run)
    if method.objective.couples_rows:
        warn("the loss compares the rows of a micro-batch: it depends on --per_device_train_batch_size")
    run = backend.settle(run)
    destination = check_destination(run.publish, run.model) if run.publish.push_to_hub else None
    ready = prepare(run, method, resumption=resumption, locate=backend.locate)
    run, method, tokenizer = ready.run, ready.method, ready.tokenizer
    ranks, device = backend.join(ready)
    kind = OnlineStage if method.samples else DistillStage if method.teaches else RowStage
    stage = kind(ready, ranks)
    data = stage.identity()
    check_equal_on_ranks(ranks, data)
    if resumption:
        check_same_data(resumption, data)
    engine = backend.build(ready, ranks, device, stage.total_steps, stage.accumulation)
    dtype = str(engine.dtype).removeprefix("torch.")
    what = f"{run.model.model}, {run.tuner.train_type}, {dtype}, {engine.device}"
    summary.tell_weights(*engine.num_parameters, what)
    if isinstance(run, RlhfRun) and run.rlhf.precompute_ref_log_probs:
        precompute(run, ready, engine, ranks)
        if not method.needs_mismatched:  # whose answers change with every step
            engine.drop_reference()
    stage.tell(flat=engine.flat)
    summary.tell_sample(tokenizer, ready.rows, waits=method.samples)
    directory = ranks.share(open_run_directory(run, ready.root, resumption) if ranks.is_main else ready.root)
    args = hide_secrets({**flatten(run), "swift_version": __version__, "command": command})
    if "global_batch_size" in args:
        args["gradient_accumulation_steps"] = None  # follows from it and the layout
    if ranks.is_main:
        write_json(directory / "args.json", args)
        if ready.eval_source is not None and not run.data.val_dataset and not resumption:
            append_jsonl(directory / "val_dataset.jsonl", (row.columns for row in ready.eval_source))
    saver = Saver(
        directory, tokenizer, args, data,
        only_model=run.schedule.save_only_model,
        total_limit=run.schedule.save_total_limit,
        symlinks=run.output.create_checkpoint_symlink,
        ranks=ranks,
        iterations=backend.iterations,
    )  # fmt: skip
    state = resumption.state if resumption else TrainState()
    if resumption and ranks.is_main:
        saver.tidy(state.best_step, state.step)
    callbacks = build_callbacks(run, directory, args, ready.callbacks) if ranks.is_main else []
    if destination and ranks.is_main:
        callbacks.append(Publisher(run.publish, destination, args))
    loop = Loop(
        engine=engine, method=method, **vars(stage.open(engine)),
        total_steps=stage.total_steps, schedule=run.schedule, saver=saver, run_directory=directory,
        callbacks=callbacks,
        follows_wishes=bool(ready.callbacks or run.schedule.early_stop_interval),
    )  # fmt: skip
    code = run_loop(loop, state)
    if code == 0 and ranks.is_main and state.last_saved_step is not None:
        backend.finish(run, directory / f"checkpoint-{state.last_saved_step}")
    return code


def precompute(run: RlhfRun, ready: Prepared, engine: Engine, ranks: Ranks) -> None:
    paths = [ready.reference_path or ready.model_path, ready.reference_adapter]
    key = "\n".join(describe_weights(path) for path in paths if path)
    for rows in (ready.rows, ready.eval_rows):
        if rows is not None:
            precompute_reference(
                engine, rows, batch_size=run.schedule.per_device_eval_batch_size, ranks=ranks,
                key=f"{key} {engine.dtype}",
            )  # fmt: skip


def run_loop(loop: Loop, state: TrainState) -> int:
    """Trains; an interrupt says how to go on."""
    directory = loop.run_directory
    try:
        with heed_signals(loop.saver.ranks):
            loop.run(state)
    except (KeyboardInterrupt, Terminated) as stop:
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        if list_checkpoints(directory):
            say(f"{word} at step {state.step}; go on with --resume_from_checkpoint {directory}")
        else:
            say(f"{word} at step {state.step}; no checkpoint was due yet (--save_steps)")
        return code
    finally:
        loop.feed.close()
    for what, step in (
        ("last_model_checkpoint", state.last_saved_step),
        ("best_model_checkpoint", state.best_step),
    ):
        if step is not None:
            say(f"{what}: {directory / f'checkpoint-{step}'}")
    if (directory / "images").exists():
        say(f"images_dir: {directory / 'images'}")
    return 0
