"""`swift infer --val_dataset`: answers to the rows of files, appended to one file that can be trained on.

The file holds the leading rows, in the order of the input, whenever it is looked at: what was answered before
is recognised and left out by the next run.
"""

import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from swift.config.generation import GenerationConfig, InferOptions
from swift.config.option import ConfigError
from swift.data.preference import PromptSample, to_prompt
from swift.data.sources import open_rows
from swift.data.types import RowError, place
from swift.engines.ranks import Ranks
from swift.infer.engine import Completion, Prompt, PromptTooLong, TransformersInferEngine
from swift.infer.openai_answers import describe_logprobs
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

    def merge(self, other: "Rejects") -> None:
        """Adds those of another process; what no process could read each of them has."""
        for reason, places in other.places.items():
            self.places[reason] += [place for place in places if place not in self.places[reason]]

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
        self.compare(completion.text, labels)

    def compare(self, response: str, labels: str | None) -> None:
        if labels is not None:
            self.num_compared += 1
            self.num_equal += response.strip() == labels.strip()

    def merge(self, other: "Stats") -> None:
        """Adds the counts of another process."""
        for name in ("prompt_tokens", "generated_tokens", "samples", "cut", "compared", "equal"):
            setattr(self, f"num_{name}", getattr(self, f"num_{name}") + getattr(other, f"num_{name}"))

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

    def seconds_left(self, num_rows: int) -> str:
        """As h:mm:ss, at the pace so far."""
        seconds = (time.perf_counter() - self.started) / max(self.num_samples, 1) * num_rows
        return str(timedelta(seconds=round(seconds)))


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


def question_key(messages: Sequence[Any], tools: Any) -> str:
    """What a row asks, as text that equal questions share."""
    return json.dumps([list(messages), tools or None], ensure_ascii=False, sort_keys=True, default=str)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, which may also hold what somebody else wrote."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def leave_out_answered(questions: Sequence[PromptSample], path: Path, stats: Stats) -> list[int]:
    """Numbers of the questions that `path` has no answer to; the answers there count for --metric."""
    responses: dict[str, list[str]] = defaultdict(list)  # by question, in the order of the file
    for row in read_rows(path):
        if isinstance(row.get("messages"), list) and "response" in row:
            responses[question_key(row["messages"][:-1], row.get("tools"))].append(row["response"])
    left = []
    for number, question in enumerate(questions):
        given = responses[question_key(question.sample.messages, question.sample.tools)]
        if given:
            stats.compare(given.pop(0), question.label)
        else:
            left.append(number)
    if len(left) < len(questions):
        say(f"{path} has answers to {len(questions) - len(left)} of {len(questions)} rows: they are left out")
    return left


def answer_rows(
    engine: TransformersInferEngine,
    questions: Sequence[tuple[int, PromptSample]],
    rejects: Rejects,
    stats: Stats,
    *,
    options: InferOptions,
    sampling: GenerationConfig,
    result_path: Path,
    ranks: Ranks | None = None,
) -> None:
    """Appends one row for each question, in their order, `--write_batch_size` at a time.

    Of several processes each answers every so-many-th row, and the first one writes. A row's number, with the
    seed, fixes what is drawn for it, whatever else is answered and by how many.
    """
    ranks = ranks or Ranks()
    window = options.write_batch_size if options.write_batch_size > 0 else max(len(questions), 1)
    mine = questions[ranks.data_rank :: ranks.data_world]
    done: dict[int, dict[str, Any] | None] = {}  # by number; None = cannot be answered
    answers = engine.complete(
        encode_questions(engine, mine, rejects, done),
        sampling,
        batch_size=options.max_batch_size,
        top_logps=options.top_logprobs or 0,
    )
    asked = dict(mine)
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
        task = progress.add_task("", total=len(mine), rate="")

        def answer_until(numbers: Sequence[int]) -> None:
            """Goes on, with later rows too, until each of `numbers` is done."""
            missing = set(numbers) - done.keys()
            while missing and (found := next(answers, None)):
                number, answer = found
                logprobs = describe_logprobs(engine.tokenizer, answer.told) if options.logprobs else None
                done[number] = result_row(asked[number], answer.text, logprobs)
                stats.add(answer, asked[number].label)
                missing -= done.keys()
                progress.update(task, completed=len(done), rate=stats.describe_rates())

        for start in range(0, len(questions), window):
            numbers = [number for number, _ in questions[start : start + window]]
            own = [number for number in numbers if number in asked]
            try:
                answer_until(own)
            except BaseException:  # an interrupted run keeps what leads to its first gap
                if ranks.world == 1:
                    write(result_path, [done[n] for n in takewhile(done.__contains__, numbers)])
                raise
            parts = ranks.collect({number: done[number] for number in own})
            rows = {number: row for part in parts for number, row in part.items()}
            if ranks.is_main:
                write(result_path, [rows[number] for number in numbers])
            left = len(questions) - start - len(numbers)
            if progress.disable and left > 0:
                time_left = stats.seconds_left(left // ranks.data_world)
                answered = f"answered {start + len(numbers)} of {len(questions)} rows"
                say(f"{answered}, {stats.describe_rates()}, {time_left} left")


def write(path: Path, rows: Sequence[dict[str, Any] | None]) -> None:
    append_jsonl(path, [row for row in rows if row is not None])


def encode_questions(
    engine: TransformersInferEngine,
    questions: Sequence[tuple[int, PromptSample]],
    rejects: Rejects,
    done: dict[int, dict[str, Any] | None],
) -> Iterator[tuple[int, Prompt]]:
    """The questions that can be asked, as tokens; the others are counted in `rejects` and are done."""
    for number, question in questions:
        asked = question.sample
        try:
            yield number, engine.encode(asked.messages, tools=asked.tools)
        except (PromptTooLong, RenderError) as error:
            done[number] = None
            too_long = f"longer than the context of {engine.context} tokens"
            reason = too_long if isinstance(error, PromptTooLong) else str(error)
            rejects.add(reason, place(asked.file, asked.line))


def result_row(
    question: PromptSample, response: str, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A line of the result file, which is a line of training data: the answer is the last message."""
    messages = [*question.sample.messages, {"role": "assistant", "content": response}]
    row = {"response": response, "labels": question.label, "logprobs": logprobs, "messages": messages}
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
