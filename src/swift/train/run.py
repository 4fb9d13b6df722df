"""A training run: config -> rows -> engine -> loop. What can be refused is, before weights load."""

from pathlib import Path

from swift import __version__
from swift.config.option import ConfigError, flatten
from swift.config.runs import SftRun
from swift.data.datasets import use_plugins
from swift.engines.ranks import join_ranks, leave_ranks
from swift.models.hub import resolve_model
from swift.models.load import context_length, load_config, load_tokenizer, pick_device
from swift.objectives.sft import Sft
from swift.template.chat import ChatTemplate
from swift.template.loss_scale import build_weights
from swift.train import summary
from swift.train.building import build_callbacks, build_engine, open_run_directory
from swift.train.offline import Offline
from swift.train.preparing import (
    check_equal_on_ranks,
    encode_sets,
    make_feed,
    open_sources,
    plan_steps,
)
from swift.train.resume import check_same_data, hide_secrets, load_resumption, with_model, with_system
from swift.train.rundir import check_writable, output_root
from swift.train.saving import Saver
from swift.train.state import TrainState
from swift.utils.files import append_jsonl, write_json
from swift.utils.log import say


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
    longest = run.template.max_length or context_length(load_config(model_path)) or 2048
    longest = min(longest, run.data.packing_length or longest)
    template = ChatTemplate(tokenizer, run.template)
    run = with_system(run, template.system)
    tokenizer.chat_template = tokenizer.chat_template or template.source  # saved with every checkpoint
    sources = open_sources(run, template, longest, resumption)
    rows, eval_rows = encode_sets(run, template, sources, longest)
    ranks, device = join_ranks(pick_device(run.model.device), run.parallel.ddp_timeout)
    plan = plan_steps(run, rows, longest, ranks, resumption)
    feed = make_feed(plan, rows, sources.stream, resumption)
    data = feed.identity()
    check_equal_on_ranks(ranks, data)
    if resumption:
        check_same_data(resumption, data)
    total_steps = plan.total_steps(run.schedule.num_train_epochs, run.schedule.max_steps)
    engine = build_engine(run, model_path, total_steps, ranks, device, resumption)
    dtype = str(engine.dtype).removeprefix("torch.")
    summary.tell_weights(engine.model, f"{run.model.model}, {run.tuner.train_type}, {dtype}, {engine.device}")
    if plan.packs:
        summary.tell_packs(plan.packs, flat=engine.flat)
    summary.tell_steps(plan, total_steps, rows if sources.stream is None else None)
    summary.tell_sample(tokenizer, rows)
    directory = ranks.share(open_run_directory(run, root, resumption) if ranks.is_main else root)
    args = hide_secrets({**flatten(run), "swift_version": __version__, "command": "sft"})
    if ranks.is_main:
        write_json(directory / "args.json", args)
        if sources.evaluation is not None and not run.data.val_dataset and not resumption:
            append_jsonl(directory / "val_dataset.jsonl", (row.columns for row in sources.evaluation))
    saver = Saver(
        directory, tokenizer, args, data,
        only_model=run.schedule.save_only_model,
        total_limit=run.schedule.save_total_limit,
        symlinks=run.output.create_checkpoint_symlink,
        ranks=ranks,
    )  # fmt: skip
    state = resumption.state if resumption else TrainState()
    loop = Offline(
        engine=engine, objective=Sft(), feed=feed, eval_rows=eval_rows, total_steps=total_steps,
        schedule=run.schedule, saver=saver, run_directory=directory,
        callbacks=build_callbacks(run, directory) if ranks.is_main else [],
    )  # fmt: skip
    code = run_loop(loop, state)
    leave_ranks()
    return code


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
    finally:
        loop.feed.close()
    for what, step in (
        ("last_model_checkpoint", state.last_saved_step),
        ("best_model_checkpoint", state.best_step),
    ):
        if step is not None:
            say(f"{what}: {directory / f'checkpoint-{step}'}")
    say(f"images_dir: {directory / 'images'}")
    return 0
