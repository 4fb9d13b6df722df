"""What every run leaves for later: logging.jsonl, and a picture of every curve."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from swift.plugins.callbacks import Callback, EndEvent, EvalEvent, StartEvent, StepEvent
from swift.utils.files import append_jsonl, read_jsonl, write_text

LOG, SAMPLES, COMPLETIONS = "logging.jsonl", "samples.jsonl", "completions.jsonl"
SMOOTHING = 0.9
NOT_DRAWN = ("epoch", "runtime", "_per_second")  # straight lines
STEP = "global_step/max_steps"


def step_of(row: dict[str, Any]) -> int | None:
    """The step of a log row; None for the closing summary."""
    return int(row[STEP].split("/")[0]) if STEP in row else None


def tagged(row: dict[str, Any]) -> dict[str, float]:
    """{"train/loss": 1.2, "eval/loss": 1.3}: the numbers of a row by the tag that trackers show."""
    return {
        f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}": v
        for k, v in row.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows one below the other, for trackers that show Markdown. Cells hold any text, rows may lack some."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, ["---"] * len(names)]
    cells += [[" ".join(str(row.get(n, "")).replace("|", "\\|").split()) for n in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def cut_log(path: Path, step: int) -> None:
    """Drops the rows after `step`, so that a resumed run writes them again. Atomic."""
    if not path.exists():
        return
    write_lines(path, [r for r in read_jsonl(path) if (at := step_of(r)) is not None and at <= step])


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class JsonlTracker(Callback):
    """One JSON object a log or eval event; the last line is the summary. Files beside it have samples, and
    rollouts: one line each, with the number of steps before it and columns as lists.
    """

    def __init__(self, run_directory: Path) -> None:
        self.path, self.samples = run_directory / LOG, run_directory / SAMPLES
        self.completions = run_directory / COMPLETIONS

    def on_start(self, event: StartEvent) -> None:
        cut_log(self.path, event.step)
        cut_log(self.samples, event.step)
        if self.completions.exists():
            lines = [line for line in read_jsonl(self.completions) if line["step"] < event.step]
            write_lines(self.completions, lines)

    def on_step(self, event: StepEvent) -> None:
        if event.row:
            append_jsonl(self.path, [event.row])
        if event.answers:
            columns = {name: [answer[name] for answer in event.answers] for name in event.answers[0]}
            append_jsonl(self.completions, [{"step": event.step - 1, **columns}])

    def on_eval(self, event: EvalEvent) -> None:
        append_jsonl(self.path, [event.row])
        if event.samples:
            append_jsonl(self.samples, ({STEP: event.row[STEP], **sample} for sample in event.samples))

    def on_end(self, event: EndEvent) -> None:
        append_jsonl(self.path, [event.row] if event.finished else [])


class Plotter(Callback):
    """images/<tag>.png from logging.jsonl when the run ends, interrupted or not."""

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory

    def on_end(self, _: EndEvent) -> None:
        plot_log(self.run_directory / LOG, self.run_directory / "images")


def plot_log(log: Path, images: Path) -> None:
    """One PNG a tag; losses also smoothed (exponential, factor 0.9, without start-up bias)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_jsonl(log) if log.exists() else []:
        step = step_of(row)
        if step is not None:
            for tag, value in tagged(row).items():
                curves.setdefault(tag, []).append((step, value))
    images.mkdir(exist_ok=True)
    for tag, points in curves.items():
        if tag.rpartition("/")[2].endswith(NOT_DRAWN):
            continue
        save_plot(images / f"{tag.replace('/', '_').replace('(', '_').replace(')', '')}.png", tag, points)


def save_plot(path: Path, tag: str, points: list[tuple[int, float]]) -> None:
    """Draws one curve with the Agg renderer, so no display is needed."""
    steps, values = zip(*points, strict=True)
    with mpl.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(7, 4))
        axes = figure.add_axes((0.11, 0.12, 0.86, 0.8))  # to find the margins itself takes twice as long
        smoothed = "loss" in tag and len(points) > 2
        style = {"alpha": 0.35 if smoothed else 1.0, "marker": "." if len(points) < 50 else ""}
        axes.plot(steps, values, color="tab:blue", **style)
        if smoothed:
            axes.plot(steps, smooth(values, SMOOTHING), color="tab:blue", label=f"smoothed {SMOOTHING}")
            axes.legend()
        axes.set(title=tag, xlabel="step")
        figure.savefig(path, dpi=100)


def smooth(values: tuple[float, ...], factor: float) -> list[float]:
    """Exponential moving average divided by its accumulated weight (as Adam corrects its moments)."""
    average, smoothed = 0.0, []
    for i, value in enumerate(values, start=1):
        average = factor * average + (1 - factor) * value
        smoothed.append(average / (1 - factor**i))
    return smoothed
