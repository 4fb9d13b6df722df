"""From --dataset to encoded rows, and from rows to the steps of a run. No model is needed for any of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.config.runs import RlhfRun, SftRun, TrainRun
from swift.data.audit import audit
from swift.data.cache import encode_cached, join_datasets, open_exported, remember
from swift.data.columns import add_classes, find_channels
from swift.data.datasets import use_plugins
from swift.data.encode import EncodedDataset, Encoder
from swift.data.feed import Feed, StoredFeed, StreamFeed
from swift.data.loader import StepPlan
from swift.data.pack import pack_lengths
from swift.data.rows import InMemory, Rows
from swift.data.shapes import SHAPES
from swift.data.sources import open_sets
from swift.data.stream import EncodedStream, Position, RowStream, open_stream
from swift.data.types import place
from swift.engines.optim import check_optim
from swift.engines.ranks import Ranks
from swift.engines.transformers.wrap import load_zero
from swift.models.directory import check_adapter_directory
from swift.models.hub import resolve_adapter, resolve_model
from swift.models.load import context_length, load_config, load_tokenizer
from swift.objectives.classification import Classification
from swift.objectives.sft import Sft
from swift.objectives.types import Objective
from swift.template.chat import ChatTemplate
from swift.template.loss_scale import build_weights
from swift.train import summary
from swift.train.hf_callbacks import find_callbacks
from swift.train.method import Method
from swift.train.resume import Resumption
from swift.train.rundir import check_writable, output_root
from swift.train.tracking import load_trackers
from swift.utils.log import warn

STREAM_HEAD = 1_000  # rows of a stream whose faults are told before weights load
ROWS_PER_STEP = 16  # what --gradient_accumulation_steps aims at when it is not given


Locate = Callable[[Any], tuple[Any, Path]]  # a run -> the run with what its model decides, and the directory


def locate_model(run: TrainRun) -> tuple[TrainRun, Path]:
    """The directory of --model, and the run with its whole path where it is no id."""
    assert run.model.model is not None
    path = resolve_model(run.model.model, revision=run.model.model_revision, **run.model.hub)
    if Path(run.model.model).is_dir():
        run = replace(run, model=replace(run.model, model=str(path)))  # absolute
    return run, path


@dataclass(frozen=True)
class Prepared:
    """Everything that a run knows before the first weight is loaded."""

    run: TrainRun
    method: Method
    resumption: Resumption | None  # where it goes on
    root: Path  # where run directories go
    model_path: Path
    model_config: PretrainedConfig
    reference_path: Path | None  # of --ref_model or --teacher_model
    reference_adapter: Path | None  # of --ref_adapters
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    rows: EncodedDataset
    eval_rows: EncodedDataset | None
    eval_source: Rows | None
    stream: EncodedStream | None  # what is trained on, where `rows` are only its head
    max_length: int  # tokens a row may have
    callbacks: list[Any]  # the users' own


def prepare(
    run: TrainRun, method: Method, *, resumption: Resumption | None, locate: Locate = locate_model
) -> Prepared:
    """Finds the model and encodes the rows. Most mistakes end here, as a ConfigError."""
    use_plugins(run.plugins)
    build_weights(run.template.loss_scale)  # a wrong name is told before anything is downloaded
    check_optim(run.optim)
    for adapter in run.tuner.adapters if not resumption else ():  # a resumed run has its own
        check_adapter_directory(Path(adapter).expanduser())
    if run.parallel.zero:
        load_zero().read_config(run.parallel.zero)
    if run.parallel.sequence_parallel_size > 1:
        check_sequences(run, method)
    if run.template.truncation_strategy == "split" and method.shape != "chat":
        raise ConfigError("--truncation_strategy split is for plain text alone", hint="swift pt, swift sft")
    if run.data.streaming:
        check_stream(run, method)
    load_trackers(run.output.report_to)
    callbacks = find_callbacks(run.output.callbacks)
    assert run.model.model is not None
    root = output_root(run.output, run.model.model)
    check_writable(root)
    hub = run.model.hub
    run, model_path = locate(run)
    reference = run.rlhf.teacher_model or run.rlhf.ref_model if isinstance(run, RlhfRun) else None
    reference_path = resolve_model(reference, revision=None, **hub) if reference else None
    adapters = run.rlhf.ref_adapters if isinstance(run, RlhfRun) else ()
    reference_adapter = resolve_adapter(adapters[0], **hub) if adapters else None
    tokenizer = load_tokenizer(model_path)
    config = load_config(model_path)
    check_same_sizes(run, reference_path, config)
    longest = run.template.max_length or context_length(config) or 2048
    longest = min(longest, run.data.packing_length or longest)
    if not method.learns_text:  # rows may consist of a question alone
        run = replace(run, template=replace(run.template, loss_scale="all"))
    template = ChatTemplate(tokenizer, run.template)
    run = replace(run, template=replace(run.template, system=template.system))  # not the file that holds it
    if run.template.use_chat_template:
        tokenizer.chat_template = tokenizer.chat_template or template.source  # saved with every checkpoint
    encoder = Encoder(template, longest, run.template.truncation_strategy, run.data.strict, method.shape)
    train_source, eval_source, stream = open_sources(run, encoder, resumption)
    rows, eval_rows = encode_sets(run, encoder, train_source, eval_source)
    for dataset in (rows, eval_rows) if method.shape == "classes" else ():
        if dataset is not None:
            assert method.num_labels is not None, "a head gives classes"
            add_classes(dataset, method.num_labels)
    method = replace(method, objective=learn_facts(method.objective, config, rows, eval_rows))
    return Prepared(
        run, method, resumption, root, model_path, config, reference_path, reference_adapter, tokenizer,
        template, rows, eval_rows, eval_source, stream, longest, callbacks,
    )  # fmt: skip


def check_same_sizes(run: TrainRun, reference_path: Path | None, config: PretrainedConfig) -> None:
    """Raises ConfigError where --sync_ref_model would mix weights of different shapes."""
    if isinstance(run, RlhfRun) and run.rlhf.sync_ref_model and reference_path:
        theirs = load_config(reference_path)
        for name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
            ours, other = getattr(config, name, None), getattr(theirs, name, None)
            if ours != other:
                raise ConfigError(
                    f"--sync_ref_model true: the {name} of --model and --ref_model are {ours} and {other}",
                    hint="leave --ref_model or --sync_ref_model out",
                )


def learn_facts(
    objective: Objective, config: PretrainedConfig, rows: EncodedDataset, eval_rows: EncodedDataset | None
) -> Objective:
    """The objective with what it must know of model and rows. Raises ConfigError where they lack it."""
    if not isinstance(objective, Sft):
        return objective
    channels: tuple[str, ...] = ()
    experts = getattr(config.get_text_config(), "num_experts_per_tok", None)
    coefficient = objective.config.router_aux_loss_coef
    if coefficient and not (experts and hasattr(config, "output_router_logits")):
        raise ConfigError(
            f"--router_aux_loss_coef {coefficient:g}: a {config.model_type} model gives out no choices of "
            "experts to balance",
            hint="leave it out",
        )
    if objective.config.enable_channel_loss:
        channels = find_channels([d for d in (rows, eval_rows) if d is not None])
    return replace(objective, channels=channels, experts_per_token=experts or 0)


def check_stream(run: TrainRun, method: Method) -> None:
    """Raises ConfigError for what needs to know all rows."""
    what = "labels" if method.shape in ("labelled", "classes") else None
    if method.teaches and isinstance(run, RlhfRun) and run.rlhf.lmbda > 0:
        what = "--lmbda above 0"
    if isinstance(run, RlhfRun) and run.rlhf.precompute_ref_log_probs:
        what = "--precompute_ref_log_probs"
    elif isinstance(run, SftRun) and run.sft.enable_channel_loss:
        what = "--enable_channel_loss"
    elif run.schedule.dataloader_drop_last:
        what = "--dataloader_drop_last"
    if what:
        raise ConfigError(f"--streaming true does not go with {what} yet", hint="leave it out")


def check_sequences(run: TrainRun, method: Method) -> None:
    """Raises ConfigError for what needs the whole of a row in one process."""
    clash = None
    if not method.learns_text or method.num_labels is not None:
        clash = "a head on the last token"
    elif isinstance(run, SftRun) and run.sft.neftune_noise_alpha:
        clash = "--neftune_noise_alpha"
    elif isinstance(run, SftRun) and run.sft.router_aux_loss_coef:
        clash = "--router_aux_loss_coef"
    if clash:
        raise ConfigError(
            f"--sequence_parallel_size {run.parallel.sequence_parallel_size} does not go with {clash} yet",
            hint="leave one of them out",
        )


def open_sources(
    run: TrainRun, encoder: Encoder, resumption: Resumption | None
) -> tuple[Rows | None, Rows | None, EncodedStream | None]:
    """Training rows, or the first ones of those that are streamed; rows of evaluation; the stream."""
    train, evaluation = open_sets(run.data, seed=run.data_seed, **run.model.hub)
    if not run.data.streaming:
        return train, evaluation, None
    source = open_stream(run.data, seed=run.data_seed, **run.model.hub)
    head = Rows([InMemory(source.head(STREAM_HEAD))])
    return head, evaluation, _start_stream(run, source, encoder, resumption)


def encode_sets(
    run: TrainRun, encoder: Encoder, train: Rows | None, evaluation: Rows | None
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Tokens of both sets, with what was dropped and why."""
    encoded = []
    training = "first training" if run.data.streaming else "training"
    for what, rows in ((training, train), ("evaluation", evaluation)):
        found = open_exported(
            run.data.cached_dataset, encoder, model=str(run.model.model), training=what == training
        )
        if rows is not None:
            dataset, report = encode_cached(
                rows, encoder, run.data, what=what, plugins=run.plugins.external_plugins
            )
            summary.tell_drops(report, what)
            found.insert(0, dataset)
        if not found:
            encoded.append(None)
            continue
        dataset = join_datasets(found)
        waits = SHAPES[encoder.shape].waits
        (summary.tell_prompts if waits else summary.tell_rows)(dataset, what)
        if what == training and not waits:
            for line in remember(dataset, "audit", partial(audit, dataset, encoder.template.stop_token_ids)):
                warn(line)
        encoded.append(dataset)
    assert encoded[0] is not None, "a run has --dataset or --cached_dataset"
    return encoded[0], encoded[1]


def _start_stream(
    run: TrainRun, source: RowStream, encoder: Encoder, resumption: Resumption | None
) -> EncodedStream:
    """Its processes are forked here, so this comes before anything that starts threads."""
    data = run.data
    capacity = (data.packing_length or encoder.max_length) if data.packing else None
    position = Position(**(resumption.state.position or {})) if resumption else None
    workers = data.dataset_num_proc if data.dataloader_num_workers is None else data.dataloader_num_workers
    if data.dataset_num_proc > 1:
        workers = max(workers, data.dataset_num_proc)
    return EncodedStream(source, encoder, capacity=capacity, workers=workers, position=position)


def make_feed(plan: StepPlan, ready: Prepared) -> Feed:
    """What the loop trains on: the rows, or the stream of which they are the head."""
    if ready.stream is None:
        return StoredFeed(ready.rows, plan)
    return StreamFeed(
        ready.stream, micro_batch_size=plan.micro_batch_size, accumulation=plan.accumulation,
        data_world=plan.data_world, next_step=ready.resumption.state.step if ready.resumption else 0,
    )  # fmt: skip


def plan_steps(ready: Prepared, ranks: Ranks) -> StepPlan:
    """How rows, or packs of them, make up steps."""
    run, rows = ready.run, ready.rows
    size = run.schedule.per_device_train_batch_size
    world = ranks.data_world
    accumulation = run.schedule.gradient_accumulation_steps or math.ceil(ROWS_PER_STEP / size / world)
    if ready.resumption:
        accumulation = keep_step_size(ready.resumption.data["rows_per_step"], size, world)
    capacity = run.data.packing_length or ready.max_length
    packs = pack_lengths(rows.lengths, capacity) if run.data.packing else None
    plan = StepPlan(
        len(rows), size, accumulation, world, seed=run.data_seed, drop_last=run.schedule.dataloader_drop_last,
        shuffle=run.data.train_dataloader_shuffle, packs=packs,
    )  # fmt: skip
    if not plan.steps_per_epoch:
        raise ConfigError(
            f"--dataloader_drop_last true leaves nothing: {plan.num_items} rows or packs, and a step takes "
            f"{plan.items_per_step}",
            hint="leave it out, or lower --gradient_accumulation_steps",
        )
    return plan


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


def check_equal_on_ranks(ranks: Ranks, data: dict[str, Any]) -> None:
    """Raises ConfigError where a process has read other rows than the first one, as on disks that differ."""
    first = ranks.share(data)
    if data != first:
        raise ConfigError(
            f"process {ranks.rank} has other training data than process 0: {data} instead of {first}",
            hint="give every node the same files",
        )


def check_rows(ready: Prepared, plan: StepPlan) -> None:
    """Raises ConfigError where a method cannot learn from rows each of which is as it should be."""
    method, rows = ready.method, ready.rows
    labels = rows.values.get("label")
    if method.shape == "kto" and labels is not None and len(set(labels.tolist())) < 2:
        what = "liked" if labels[0] else "disliked"
        raise ConfigError(
            f"all {len(rows)} training rows are {what}: --rlhf_type kto learns from both kinds",
            hint="add rows with the other label",
        )
    classes = method.num_labels or 1
    if isinstance(method.objective, Classification) and method.objective.is_one_class and labels is not None:
        wrong = np.flatnonzero((labels != np.round(labels)) | (labels < 0) | (labels >= classes))
        if len(wrong):
            raise ConfigError(
                f"{place(*rows.places[wrong[0]])}: label {labels[wrong[0]]:g} is not a class from 0 to "
                f"{classes - 1} (--num_labels {classes})",
                hint="number the classes from 0, or raise --num_labels",
            )
    if method.needs_mismatched and plan.items_per_step == 1 and plan.packs is None:
        raise ConfigError(
            "--rlhf_type kto compares the rows of a step, and a step has one row",
            hint="raise --gradient_accumulation_steps or --per_device_train_batch_size",
        )
