"""From --dataset to encoded rows, and from rows to the steps of a run. No model is needed for any of it."""

import math
from functools import partial
from typing import Any

from swift.config.option import ConfigError
from swift.config.runs import SftRun
from swift.data.audit import audit
from swift.data.cache import encode_cached, join_datasets, open_exported, remember
from swift.data.encode import EncodedDataset
from swift.data.loader import StepPlan
from swift.data.pack import pack_lengths
from swift.data.rows import Rows
from swift.engines.ranks import Ranks
from swift.template.chat import ChatTemplate
from swift.train import summary
from swift.train.resume import Resumption
from swift.utils.log import warn

ROWS_PER_STEP = 16  # what --gradient_accumulation_steps aims at when it is not given


def encode_sets(
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
    world = ranks.data_world
    accumulation = run.schedule.gradient_accumulation_steps or math.ceil(ROWS_PER_STEP / size / world)
    if resumption:
        accumulation = keep_step_size(resumption.data["rows_per_step"], size, world)
    packs = pack_lengths(rows.lengths, run.data.packing_length or longest) if run.data.packing else None
    return StepPlan(
        len(rows), size, accumulation, world, seed=run.data_seed,
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
