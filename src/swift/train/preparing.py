"""From --dataset to encoded rows, and from rows to the steps of a run. No model is needed for any of it."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from swift.config.option import ConfigError
from swift.config.runs import SftRun
from swift.data.audit import audit
from swift.data.cache import encode_cached, join_datasets, open_exported, remember
from swift.data.encode import EncodedDataset, Encoder
from swift.data.feed import Feed, StoredFeed, StreamFeed
from swift.data.loader import StepPlan
from swift.data.pack import pack_lengths
from swift.data.rows import InMemory, Rows
from swift.data.sources import open_sets
from swift.data.stream import EncodedStream, Position, RowStream, open_stream
from swift.engines.ranks import Ranks
from swift.template.chat import ChatTemplate
from swift.train import summary
from swift.train.resume import Resumption
from swift.utils.log import warn

STREAM_HEAD = 1_000  # rows of a stream whose faults are told before weights load
ROWS_PER_STEP = 16  # what --gradient_accumulation_steps aims at when it is not given


@dataclass(frozen=True)
class Sources:
    """Rows of a run. Of training rows that are streamed, `train` has the first ones."""

    train: Rows | None
    evaluation: Rows | None
    stream: EncodedStream | None = None


def open_sources(
    run: SftRun, template: ChatTemplate, max_length: int, resumption: Resumption | None
) -> Sources:
    """Finds the rows that a run names."""
    hub: dict[str, Any] = {"use_hf": run.model.use_hf, "token": run.model.hub_token}
    train, evaluation = open_sets(run.data, seed=run.data_seed, **hub)
    if not run.data.streaming:
        return Sources(train, evaluation)
    source = open_stream(run.data, seed=run.data_seed, **hub)
    head = Rows([InMemory(source.head(STREAM_HEAD))])
    return Sources(head, evaluation, _start_stream(run, source, template, max_length, resumption))


def encode_sets(
    run: SftRun, template: ChatTemplate, sources: Sources, max_length: int
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Tokens of both sets, with what was dropped and why."""
    encoded = []
    training = "training" if sources.stream is None else "first training"
    for what, rows in ((training, sources.train), ("evaluation", sources.evaluation)):
        found = open_exported(
            run.data.cached_dataset, template, run.template,
            model=str(run.model.model), max_length=max_length, training=what == training,
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
        if what == training:
            for line in remember(dataset, "audit", partial(audit, dataset, template.stop_token_ids)):
                warn(line)
        encoded.append(dataset)
    assert encoded[0] is not None, "a run has --dataset or --cached_dataset"
    return encoded[0], encoded[1]


def _start_stream(
    run: SftRun, source: RowStream, template: ChatTemplate, max_length: int, resumption: Resumption | None
) -> EncodedStream:
    """Its processes are forked here, so this comes before anything that starts threads."""
    data, capacity = run.data, (run.data.packing_length or max_length) if run.data.packing else None
    encoder = Encoder(template, max_length, run.template.truncation_strategy, data.strict)
    position = Position(**(resumption.state.position or {})) if resumption else None
    workers = data.dataset_num_proc if data.dataloader_num_workers is None else data.dataloader_num_workers
    if data.dataset_num_proc > 1:
        workers = max(workers, data.dataset_num_proc)
    return EncodedStream(source, encoder, capacity=capacity, workers=workers, position=position)


def make_feed(
    plan: StepPlan, rows: EncodedDataset, stream: EncodedStream | None, resumption: Resumption | None
) -> Feed:
    """What the loop trains on: `rows`, or the stream of which they are the head."""
    if stream is None:
        return StoredFeed(rows, plan)
    return StreamFeed(
        stream, micro_batch_size=plan.micro_batch_size, accumulation=plan.accumulation,
        data_world=plan.data_world, first_step=resumption.state.step if resumption else 0,
    )  # fmt: skip


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


def check_equal_on_ranks(ranks: Ranks, data: dict[str, Any]) -> None:
    """Raises ConfigError where a process has read other rows than the first one, as on disks that differ."""
    first = ranks.share(data)
    if data != first:
        raise ConfigError(
            f"process {ranks.rank} has other training data than process 0: {data} instead of {first}",
            hint="give every node the same files",
        )
