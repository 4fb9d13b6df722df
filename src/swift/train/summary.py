"""What is about to be trained, told before the first step: rows, drops, steps, weights, one sample."""

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from swift.batch import IGNORED
from swift.data.encode import EncodedDataset, EncodeReport
from swift.data.loader import StepPlan
from swift.data.pack import Packs
from swift.template.preview import trained_segments
from swift.utils.log import console, say, warn

SHOWN_TOKENS = 600
SHOWN_ANSWERS = 4  # rows whose rewards are told at each evaluation
ANSWERS = {"pair": ("chosen", "rejected"), "kto": ("answer",)}  # by the shape of rows


def tell_drops(report: EncodeReport, what: str) -> None:
    """Every dropped row is counted under its reason, with where to find the first few."""
    for reason, places in report.dropped.items():
        where = ", ".join(f"{file}:{line}" for file, line in places[:3])
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        warn(f"{len(places)} of {report.total} {what} rows dropped: {reason} ({where}{more})")


def tell_prompts(rows: EncodedDataset, what: str) -> None:
    say(f"{what}: {len(rows):,} prompts, {rows.num_tokens:,} tokens, longest {rows.lengths.max():,}")


def tell_rows(rows: EncodedDataset, what: str) -> None:
    share = 100 * rows.num_trained / max(rows.num_tokens, 1)
    say(
        f"{what}: {len(rows):,} rows, {rows.num_tokens:,} tokens, {rows.num_trained:,} of them trained "
        f"({share:.0f} %), longest {rows.lengths.max():,}"
    )


def tell_weights(trained: int, total: int, description: str) -> None:
    share = 100 * trained / total
    say(
        f"model: {description}: {total / 1e6:,.1f} M parameters, "
        f"{trained / 1e6:,.2f} M trained ({share:.2f} %)"
    )


def tell_packs(packs: Packs, *, flat: bool) -> None:
    say(
        f"packing: {len(packs):,} packs of up to {packs.capacity:,} tokens, {100 * packs.fill:.2f} % full, "
        f"{len(packs.rows) / len(packs):.1f} rows a pack"
    )
    if not flat:
        warn("--packing true: this model needs padding, so the rows of a pack are padded to its longest")


def tell_steps(plan: StepPlan, total_steps: int, rows: EncodedDataset | None, *, world: int) -> None:
    """`rows` are none where they are streamed. Groups of `world` processes may share rows or the model."""
    items, size = "packs" if plan.packs else "rows", world // plan.data_world
    who = f"group(s) of {size} processes" if size > 1 else "process(es)"
    say(
        f"steps: {plan.items_per_step} {items} a step ({plan.micro_batch_size} x {plan.accumulation} "
        f"accumulated x {plan.data_world} {who}), "
        + (f"{plan.steps_per_epoch} steps an epoch, " if rows else "")
        + f"{total_steps} in all"
    )
    if rows:
        say(f"tokens: about {rows.num_tokens / plan.steps_per_epoch:,.0f} a step")


def show_answers(
    tokenizer: PreTrainedTokenizerBase, rows: EncodedDataset | None, shape: str
) -> list[dict[str, str]]:
    """The first held-out rows of a method that rewards answers, as text; nothing of other methods.

    A reward model reads whole texts: there the question is part of the answers.
    """
    shown = []
    for number in range(min(SHOWN_ANSWERS, len(rows)) if rows and shape in ANSWERS else 0):
        found = rows.sequences(number)
        start = int(np.argmax(found[0].labels != IGNORED))
        texts = {"prompt": found[0].input_ids[:start]}
        for name, sequence in zip(ANSWERS[shape], found, strict=True):
            texts[name] = sequence.input_ids[int(np.argmax(sequence.labels != IGNORED)) :]
        shown.append({k: tokenizer.decode(ids, skip_special_tokens=True).strip() for k, ids in texts.items()})
    return shown


def tell_sample(tokenizer: PreTrainedTokenizerBase, rows: EncodedDataset, *, waits: bool) -> None:
    """One row as the model sees it: its sequences one below the other."""
    texts = []
    for sequence in rows.sequences(0):
        text = Text()
        for piece, weight in trained_segments(tokenizer, sequence):
            text.append(piece, style="bold green" if weight > 0 else "dim")
        if len(sequence.input_ids) > SHOWN_TOKENS:
            text.truncate(4 * SHOWN_TOKENS, overflow="ellipsis")
        texts += [Rule(style="dim"), text]
    title = "one prompt as the model sees it" if waits else "one row as the model sees it: green is trained"
    console().print(Panel(Group(*texts[1:]), title=title, title_align="left"), soft_wrap=False)
