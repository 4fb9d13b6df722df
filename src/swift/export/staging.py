"""How an export becomes a directory: built beside its place, and named when it is whole.

Owns: the directory that is built in, files that are copied as published, the last move.
Not here: weights, and whether they are right.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swift import __version__
from swift.config.option import ConfigError
from swift.models.adapters import RUN_ARGS
from swift.models.directory import INDEX_FILES, weight_files
from swift.models.load import TOKENIZER_FILES
from swift.models.prompts import carry_template
from swift.utils.files import write_json
from swift.utils.log import say

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_PARTS = (
    *TOKENIZER_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template*",
)  # fmt: skip
TEXTS = (*TOKENIZER_PARTS, GENERATION_CONFIG)


@contextmanager
def staging_beside(output: Path) -> Iterator[Path]:
    """An empty directory beside the output; nothing of it stays. Raises ConfigError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise ConfigError(f"--output_dir {output} cannot be written: {error}") from error
    with work as directory:
        staging = Path(directory) / "model"
        staging.mkdir()  # not the temporary directory itself, which only its owner may read
        yield staging


def copy_texts(source: Path, target: Path, patterns: Iterable[str] = TEXTS) -> None:
    """Files of a directory that match one of the patterns, as they are; TEXTS: beside weights and config."""
    for file in {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, target / file.name)


def write_texts(source: Path, staging: Path, output: Path, run_args: dict[str, Any], **own: Any) -> None:
    """Tokenizer files as they are, up to what the run says about its prompts, and args.json.

    With these, `swift infer --model DIR` asks for no other flag: system prompt and template are the run's.
    """
    copy_texts(source, staging)
    run_args = carry_template(staging, run_args)
    about = {"model": str(output), "adapters": [], "command": "export", "swift_version": __version__}
    write_json(staging / RUN_ARGS, run_args | about | {"model_revision": None} | own)


def place(staging: Path, output: Path, *, exist_ok: bool, about: str, last: str = CONFIG) -> None:
    """Gives the checked directory its name; into an existing one the files are moved one by one.

    Files of the user's stay. `last`, without which nobody takes the directory for a model, goes first and
    comes last, so that a model half old and half new is never taken for a whole one. `about`: is said of it.
    """
    for path in (staging, *staging.rglob("*")):  # so that everyone may read
        path.chmod(0o755 if path.is_dir() else 0o644)
    if exist_ok and output.is_dir():
        (output / last).unlink(missing_ok=True)
        if last == CONFIG:
            for old in [*weight_files(output), *(output / name for name in INDEX_FILES)]:
                old.unlink(missing_ok=True)
        for file in sorted(staging.iterdir(), key=lambda f: f.name == last):
            if file.is_dir():
                shutil.rmtree(output / file.name, ignore_errors=True)
            file.replace(output / file.name)
    else:
        staging.rename(output)  # fails, rather than overwriting, where the name was taken meanwhile
    say(f"wrote {output} ({total_bytes(output) / 1e6:,.0f} MB, {about})")


def total_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
