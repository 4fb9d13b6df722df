"""The directory of a run: output/vN-date, made once, after everything that can be refused."""

import re
import time
from pathlib import Path

from swift.config.option import ConfigError
from swift.config.schedule import OutputConfig

VERSION = re.compile(r"v(\d+)-")


def output_root(config: OutputConfig, model: str) -> Path:
    """--output_dir, or output/<last part of the model's name>."""
    return Path(config.output_dir or Path("output") / Path(model).name).expanduser().absolute()


def check_writable(directory: Path) -> None:
    """Raises ConfigError when a run could not write there. Leaves nothing behind."""
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output_dir {directory}: {existing} is a file", hint="name another directory")
    probe = existing / f".swift-probe-{time.time_ns()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--output_dir {directory} cannot be written: {error.strerror}", hint="name another directory"
        ) from error


def new_run_directory(root: Path, add_version: bool) -> Path:
    """Makes `root/vN-YYYYmmdd-HHMMSS`, N one above the highest there; `root` itself without versions."""
    if not add_version:
        root.mkdir(parents=True, exist_ok=True)
        return root
    taken = [int(m[1]) for p in root.glob("v*-*") if (m := VERSION.match(p.name))]
    path = root / f"v{max(taken, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}"
    path.mkdir(parents=True)
    return path
