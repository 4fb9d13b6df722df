"""`swift dataset`: what a data set holds and what of it is trained. No weights are loaded."""

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from swift.config.data import DataConfig
from swift.config.option import ConfigError
from swift.config.runs import DatasetRun
from swift.data.datasets import use_plugins
from swift.data.encode import EncodedDataset, Encoder, EncodeReport, encode_rows
from swift.data.sources import open_rows
from swift.data.types import Row, place
from swift.dataset.blocks import Page, Shown, Table, inspection_page, print_page, render_page
from swift.dataset.measure import inspect
from swift.models.hub import resolve_model
from swift.models.load import context_length, load_config, load_tokenizer
from swift.template.chat import ChatTemplate
from swift.template.preview import trained_segments
from swift.utils.files import write_json, write_text
from swift.utils.log import result_console, say

_NO_LIMIT = 2**31 - 1  # tokens: rows are encoded whole, and what a limit would do is computed


def run_dataset(run: DatasetRun) -> int:
    """Inspects or previews as `run` says; returns the exit code."""
    use_plugins(run.plugins)
    options, model = run.options, run.model
    outputs = [Path(path).expanduser() for path in (options.json, _report_path(run)) if path]
    for path in outputs:
        _prepare(path)
    assert model.model is not None
    model_path = resolve_model(model.model, revision=model.model_revision, **model.hub)
    template = ChatTemplate(load_tokenizer(model_path), run.template)
    opened = open_rows(
        options.dataset,
        seed=options.data_seed,
        shuffle=options.dataset_shuffle,
        columns=options.columns,
        model_name=options.model_name,
        model_author=options.model_author,
        **model.hub,
        keep_broken=True,
    )
    rows = list(opened)
    if options.action == "inspect":
        page = inspect_rows(run, rows, template, context_length(load_config(model_path)))
    else:
        page = preview_rows(run, rows, template)
    print_page(page, result_console())
    report = outputs[-1]
    write_text(report, render_page(page))
    say(f"report: {report}")
    return 0


def inspect_rows(run: DatasetRun, rows: list[Row], template: ChatTemplate, context: int | None) -> Page:
    """All numbers as a page; --json is written here."""
    dataset, report = _encode(run, rows, template)
    found = inspect(
        dataset,
        sources=dict(Counter(row.file for row in rows)),
        dropped=report.dropped,
        max_length=run.template.max_length or context or 2048,
        template=template,
        near_duplicates=run.options.near_duplicates,
    )
    if run.options.json:
        write_json(Path(run.options.json).expanduser(), asdict(found))
    return inspection_page(found, f"Data for {run.model.model}", " ".join(run.options.dataset))


def preview_rows(run: DatasetRun, rows: list[Row], template: ChatTemplate) -> Page:
    """Some rows as a page, in the order of the data."""
    indices = [number - 1 for number in run.options.row]
    if indices and max(indices) >= len(rows):
        raise ConfigError(f"--row {max(indices) + 1}: there are {len(rows)} rows")
    if not indices:
        count = min(run.options.num_rows, len(rows))
        indices = sorted(random.Random(run.options.data_seed).sample(range(len(rows)), count))
    chosen = [rows[i] for i in indices]
    dataset, report = _encode(run, chosen, template)
    shown = []
    for i, sample in enumerate(dataset.samples):
        encoded = dataset[i]
        trained = int((encoded.labels >= 0).sum())
        facts = f"{len(encoded.input_ids):,} tokens, {trained:,} trained"
        pieces = trained_segments(template.tokenizer, encoded)
        shown.append(Shown(place(sample.file, sample.line), facts, pieces))
    bad = [(place(*where), reason) for reason, places in report.dropped.items() for where in places]
    dropped = [Table("Rows that cannot be used", ("where", "why"), bad)] if bad else []
    subtitle = (
        f"{' '.join(run.options.dataset)}: {len(chosen):,} of {len(rows):,} rows; marked text is trained"
    )
    return Page(f"Rows as {run.model.model} sees them", subtitle, [], [], [*shown, *dropped])


def _encode(run: DatasetRun, rows: list[Row], template: ChatTemplate) -> tuple[EncodedDataset, EncodeReport]:
    """Every row that can be encoded, at any length; nothing stops at a bad one."""
    processes = run.options.dataset_num_proc
    config = DataConfig(dataset_num_proc=processes, max_drop_ratio=1.0, allow_unsupervised=True)
    encoder = Encoder(template, _NO_LIMIT, run.template.truncation_strategy)
    return encode_rows(rows, encoder, config, what="inspected")


def _report_path(run: DatasetRun) -> str:
    if run.options.report:
        return run.options.report
    name = Path(run.options.dataset[0].partition("#")[0]).stem or "data"
    return f"output/dataset/{name.replace(':', '-')}-{run.options.action}.html"


def _prepare(path: Path) -> None:
    """The directory of a file to write, before anything slow."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from error
    if path.is_dir():
        raise ConfigError(f"{path} is a directory", hint="name a file")
