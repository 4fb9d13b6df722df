"""`swift infer --val_dataset`: answers to the rows of files, appended to one file that can be trained on."""

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from swift.config.generation import GenerationConfig, InferOptions
from swift.config.option import ConfigError
from swift.data.preference import PromptSample, to_prompt
from swift.data.sources import open_rows
from swift.data.types import RowError, place
from swift.infer.engine import Completion, Prompt, PromptTooLong, TransformersInferEngine
from swift.template.types import RenderError
from swift.utils.files import append_jsonl
from swift.utils.log import console, say, warn

PLACES_SHOWN = 5  # rows named for each reason why rows cannot be used


@dataclass(slots=True)
class Rejects:
    """Rows that cannot be used, by reason; with `strict` the first one is an error."""

    strict: bool
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, place: str) -> None:
        if self.strict:
            raise ConfigError(f"{place}: {reason}", hint="leave out --strict to go on without such rows")
        self.places[reason].append(place)

    def report(self) -> None:
        for reason, places in self.places.items():
            more = f" and {len(places) - PLACES_SHOWN} more" if len(places) > PLACES_SHOWN else ""
            rows = "1 row" if len(places) == 1 else f"{len(places)} rows"
            warn(f"{rows} not answered, {reason}: {', '.join(places[:PLACES_SHOWN])}{more}")


@dataclass(slots=True)
class Stats:
    started: float = field(default_factory=time.perf_counter)
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_samples: int = 0
    num_cut: int = 0  # answers that --max_new_tokens or the context ended
    num_compared: int = 0
    num_equal: int = 0

    def add(self, completion: Completion, labels: str | None) -> None:
        self.num_prompt_tokens += completion.num_prompt_tokens
        self.num_generated_tokens += completion.num_generated_tokens
        self.num_samples += 1
        self.num_cut += completion.finish_reason == "length"
        if labels is not None:
            self.num_compared += 1
            self.num_equal += completion.text.strip() == labels.strip()

    def summary(self) -> dict[str, float]:
        """The figures shown at the end; `runtime` in seconds, `tokens/s` counts generated tokens."""
        runtime = max(time.perf_counter() - self.started, 1e-9)
        return {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated_tokens": self.num_generated_tokens,
            "num_samples": self.num_samples,
            "runtime": round(runtime, 3),
            "samples/s": round(self.num_samples / runtime, 3),
            "tokens/s": round(self.num_generated_tokens / runtime, 3),
        }

    def describe_rates(self) -> str:
        now = self.summary()
        return f"{now['samples/s']:.1f} rows/s {now['tokens/s']:.0f} tokens/s"


def load_questions(
    specs: Sequence[str],
    options: InferOptions,
    *,
    seed: int,
    columns: dict[str, Any],
    **names_and_hub: Any,
) -> tuple[list[PromptSample], Rejects]:
    """The rows to answer, `names_and_hub` as open_rows takes them. Raises ConfigError when there is none."""
    opened = open_rows(specs, seed=seed, shuffle=options.dataset_shuffle, columns=columns, **names_and_hub)
    rows = list(opened)
    if options.val_dataset_sample and options.val_dataset_sample < len(rows):
        kept = random.Random(seed).sample(range(len(rows)), options.val_dataset_sample)
        rows = [rows[i] for i in sorted(kept)]
    rejects = Rejects(options.strict)
    questions = []
    for row in rows:
        try:
            questions.append(to_prompt(row))
        except RowError as error:
            rejects.add(str(error), place(row.file, row.line))
    if not questions:
        rejects.report()
        raise ConfigError(f"no row of {' '.join(specs)} can be answered", hint="rows need a question")
    return questions, rejects


def answer_rows(
    engine: TransformersInferEngine,
    questions: Sequence[PromptSample],
    rejects: Rejects,
    *,
    options: InferOptions,
    sampling: GenerationConfig,
    result_path: Path,
) -> Stats:
    """Appends one row for each question, in their order, `--write_batch_size` at a time."""
    window = options.write_batch_size if options.write_batch_size > 0 else len(questions)
    stats = Stats()
    with Progress(
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console(),
        transient=True,
        disable=not console().is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(questions), rate="")
        for start in range(0, len(questions), window):
            part = questions[start : start + window]
            usable = encode_questions(engine, part, rejects)
            progress.advance(task, len(part) - len(usable))
            answers: dict[int, Completion] = {}
            try:
                for i, answer in engine.complete(
                    [prompt for _, prompt in usable],
                    replace(sampling, seed=sampling.seed + start),
                    batch_size=options.max_batch_size,
                ):
                    answers[i] = answer
                    stats.add(answer, usable[i][0].label)
                    progress.update(task, advance=1, rate=stats.describe_rates())
            finally:  # an interrupted window keeps the answers that it has
                append_jsonl(
                    result_path, [result_row(usable[i][0], answers[i].text) for i in sorted(answers)]
                )
            if progress.disable and start + window < len(questions):
                say(f"answered {stats.num_samples} of {len(questions)} rows, {stats.describe_rates()}")
    return stats


def encode_questions(
    engine: TransformersInferEngine, questions: Sequence[PromptSample], rejects: Rejects
) -> list[tuple[PromptSample, Prompt]]:
    """The questions that can be asked, as tokens; the others are counted in `rejects`."""
    usable = []
    for question in questions:
        asked = question.sample
        try:
            prompt = engine.encode(asked.messages, tools=asked.tools)
        except PromptTooLong:
            reason = f"longer than the context of {engine.context} tokens"
            rejects.add(reason, place(asked.file, asked.line))
        except RenderError as error:
            rejects.add(str(error), place(asked.file, asked.line))
        else:
            usable.append((question, prompt))
    return usable


def result_row(question: PromptSample, response: str) -> dict[str, Any]:
    """A line of the result file, which is a line of training data: the answer is the last message."""
    messages = [*question.sample.messages, {"role": "assistant", "content": response}]
    row = {"response": response, "labels": question.label, "logprobs": None, "messages": messages}
    tools = {"tools": question.sample.tools} if question.sample.tools else {}
    return row | tools | {name: value for name, value in question.sample.extra.items() if name not in row}


def mend_last_line(path: Path) -> None:
    """Makes a file ready for appending: cuts off a last line that a killed process left unfinished."""
    if not path.exists():
        return
    with path.open("rb+") as handle:
        size, last = 0, b"\n"
        for line in handle:
            size, last = size + len(line), line
        if last.endswith(b"\n"):
            return
        try:
            json.loads(last)
            handle.write(b"\n")  # the reading left us at the end
        except ValueError:
            handle.truncate(size - len(last))
            warn(f"{path}: the unfinished last line was removed")


def report(stats: Stats, rejects: Rejects, *, metric: str | None, result_path: Path) -> None:
    rejects.report()
    if stats.num_cut:
        say(f"{stats.num_cut} of {stats.num_samples} answers were cut by --max_new_tokens or the context")
    if metric == "acc":
        share = f"{stats.num_equal / stats.num_compared:.4f}" if stats.num_compared else "none"
        say(f"acc {share} ({stats.num_equal} of {stats.num_compared} answers equal the row's own)")
    say(json.dumps(stats.summary()))
    say(f"answers in {result_path}")
