"""`swift export --to_cached_dataset true`: rows to token ids, for `--cached_dataset` of later runs."""

import shutil
import tempfile
from pathlib import Path

from swift.config.option import ConfigError
from swift.config.runs import ExportRun
from swift.data.cache import describe_encoder, write_entry
from swift.data.datasets import use_plugins
from swift.data.encode import Encoder
from swift.data.sources import open_sets
from swift.models.hub import resolve_model
from swift.models.load import context_length, load_config, load_tokenizer
from swift.template.chat import ChatTemplate
from swift.utils.log import say, warn


def export_encoded(run: ExportRun) -> int:
    """Writes train/ and, where evaluation rows are named or split off, val/. The exit code is 0."""
    assert run.model.model is not None
    use_plugins(run.plugins)
    name = Path(run.model.model).expanduser().name
    output = Path(run.export.output_dir or f"{name}-cached_dataset").expanduser()
    if output.exists() and not (run.export.exist_ok and output.is_dir()):
        raise ConfigError(f"--output_dir {output} exists", hint="name another, or --exist_ok true")
    model = resolve_model(run.model.model, revision=run.model.model_revision, **run.model.hub)
    template = ChatTemplate(load_tokenizer(model), run.template)
    longest = run.template.max_length or context_length(load_config(model)) or 2048
    seed = 42 if run.data.data_seed is None else run.data.data_seed
    training, evaluation = open_sets(run.data, seed=seed, **run.model.hub)
    encoder = Encoder(template, longest, run.template.truncation_strategy, run.data.strict)
    about = {**describe_encoder(encoder), "model": run.model.model}
    named = (("train", "training", training), ("val", "evaluation", evaluation))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as temporary:
        for folder, what, rows in named:
            if rows is None:
                continue
            report = write_entry(Path(temporary) / folder, encoder, rows, run.data, what=what, about=about)
            if report.dropped:
                warn(f"{report.num_dropped} of {report.total} {what} rows dropped: {report.summary()}")
            say(f"{report.kept:,} {what} rows encoded: {output / folder}")
        output.mkdir(exist_ok=True)
        for folder, _, _ in named:
            shutil.rmtree(output / folder, ignore_errors=True)
            if (Path(temporary) / folder).exists():
                (Path(temporary) / folder).rename(output / folder)
    return 0
