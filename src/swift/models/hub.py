"""`--model` and `--adapters` -> a directory on this machine.

Order: a directory, the built-in model, the caches of HuggingFace and ModelScope, then the hub itself.
Owns: that order and the errors in words.
Not here: what a whole directory is (directory.py), the built-in model (builtin.py).
"""

import importlib
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from swift.config.option import ConfigError
from swift.models.builtin import SMOLLM2, resolve_packaged
from swift.models.directory import (
    ADAPTER_CONFIG,
    check_adapter_directory,
    check_model_directory,
    missing_adapter_file,
    missing_model_file,
)
from swift.utils import env
from swift.utils.log import say

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
REACHABLE_SECONDS = 5  # how long a hub may take to answer before we say that it does not
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
IGNORED_FILES = ("*/*", "consolidated*")  # other formats of the same weights
NO_HUB_HINT = "fetch it elsewhere and pass its directory; --model smollm2-135m needs no hub"


def resolve_model(
    model: str, *, use_hf: bool = False, revision: str | None = None, token: str | None = None
) -> Path:
    """The directory of a model with config and weights; downloads only what is nowhere on this machine."""
    path = find_directory(model, "--model")
    use_hf = use_hf or env.is_on("USE_HF")
    if path is None and model.lower() == SMOLLM2.name:
        return resolve_packaged(SMOLLM2)
    path = path or find_cached(model, use_hf, revision, "config.json", missing_model_file)
    if path is None and model.lower() == SMOLLM2.hub_id.lower() and not revision:
        return resolve_original_or_copy(model, use_hf, token)
    path = path or download("--model", model, use_hf=use_hf, revision=revision, token=token)
    check_model_directory(path)
    return path


def resolve_adapter(
    adapter: str, *, use_hf: bool = False, revision: str | None = None, token: str | None = None
) -> Path:
    path = find_directory(adapter, "--adapters")
    use_hf = use_hf or env.is_on("USE_HF")
    path = path or find_cached(adapter, use_hf, revision, ADAPTER_CONFIG, missing_adapter_file)
    path = path or download("--adapters", adapter, use_hf=use_hf, revision=revision, token=token)
    check_adapter_directory(path)
    return path


def find_directory(name: str, flag: str) -> Path | None:
    """The directory called `name`; None when `name` is an id of a hub; ConfigError when it can be neither."""
    if not name.strip():
        raise ConfigError(f"{flag} is empty")
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ConfigError(
            f"{flag} {name} is a file", hint="name the directory that holds config.json and the weights"
        )
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or "\\" in name or len(parts) > 2:
        raise ConfigError(f"{flag} {name}: no such directory")
    if len(parts) == 2 and Path(parts[0]).is_dir():
        raise ConfigError(
            f"{flag} {name}: no such directory",
            hint=f"{parts[0]} is a directory here, so this is not read as a hub id",
        )
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f"{flag} {name}: neither a directory nor a hub id such as Qwen/Qwen3-0.6B")
    return None


def resolve_original_or_copy(model: str, use_hf: bool, token: str | None) -> Path:
    """The published SmolLM2 where HuggingFace is asked for and answers, else the built-in copy of it."""
    reason = "not in the local cache, and --use_hf true was not given"
    if use_hf:
        try:
            path = download("--model", model, use_hf=True, revision=None, token=token)
        except ConfigError as error:
            reason = error.message
        else:
            check_model_directory(path)
            return path
    say(f"{model}: {reason}; using {SMOLLM2.name}, the built-in 4-bit (Q4_1) dequantised copy")
    return resolve_packaged(SMOLLM2)


def find_cached(
    name: str, use_hf: bool, revision: str | None, marker: str, missing: Callable[[Path], str | None]
) -> Path | None:
    """A whole copy in the caches of the two hubs, the one asked for first. Never touches the network."""
    huggingface = list(huggingface_copies(name, revision, marker))
    modelscope = list(modelscope_copies(name, revision))
    candidates = huggingface + modelscope if use_hf else modelscope + huggingface
    return next((path for path in candidates if path.is_dir() and missing(path) is None), None)


def huggingface_copies(name: str, revision: str | None, marker: str) -> Iterator[Path]:
    """The snapshot of `name` in HuggingFace's cache that has the file `marker`."""
    try:
        found = try_to_load_from_cache(name, marker, revision=revision)
    except HFValidationError:
        return
    if isinstance(found, str):  # otherwise None, or a mark that the hub has no such file
        yield Path(found).parent


def modelscope_copies(name: str, revision: str | None) -> Iterator[Path]:
    """Where the versions of ModelScope's library keep `name`.

    Since 1.38 under snapshots/REVISION; before that in plain directories, with dots in names written as three
    underscores, which say nothing about the revision.
    """
    if name.count("/") != 1:
        return
    owner, repository = name.split("/")
    root = Path(env.read("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()
    snapshots = root / "models" / f"{owner}--{repository}" / "snapshots"
    yield snapshots / (revision or "master")
    if revision:
        return
    for parent in (root / "models", root / "hub" / "models", root / "hub", root):
        for spelling in (repository.replace(".", "___"), repository):
            yield parent / owner / spelling


def download(flag: str, name: str, *, use_hf: bool, revision: str | None, token: str | None) -> Path:
    """Fetches `name` from the hub that ids mean; every failure is a ConfigError in words."""
    if "/" not in name and not use_hf:
        raise ConfigError(
            f"{flag} {name}: no such directory, and hub ids have the form org/name", hint=NO_HUB_HINT
        )
    offline = offline_switch(use_hf=use_hf)
    if offline:
        raise ConfigError(
            f"{flag} {name} is neither a directory nor in the cache, and {offline} is on",
            hint=NO_HUB_HINT,
        )
    with explained(f"{flag} {name}", "fetched from", use_hf=use_hf, revision=revision):
        if use_hf:
            return fetch_from_huggingface(name, revision, token)
        library = load_modelscope(f"{flag} {name}: no such directory, and")
        say(f"{name}: fetching from ModelScope")
        path: Path = library.fetch(name, revision=revision, token=token)
        return path


def offline_switch(*, use_hf: bool) -> str | None:
    """The environment variable that forbids asking this hub; None when it may be asked."""
    switches = ("SWIFT_OFFLINE", "HF_HUB_OFFLINE") if use_hf else ("SWIFT_OFFLINE",)
    return next((variable for variable in switches if env.is_on(variable)), None)


def fetch_from_huggingface(name: str, revision: str | None, token: str | None) -> Path:
    # Asked first and with a limit of its own: an unreachable hub is known within seconds.
    info = HfApi(token=token).model_info(name, revision=revision, timeout=REACHABLE_SECONDS)
    patterns = choose_files([file.rfilename for file in info.siblings or []])
    say(f"{name}: fetching from HuggingFace")
    ignored = list(IGNORED_FILES)
    return Path(
        snapshot_download(
            name, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=ignored
        )
    )


def choose_files(names: list[str]) -> list[str]:
    """Patterns of the files that we want of a repository: texts, and one format of the weights."""
    return [*TEXT_FILES, "*.safetensors" if any(n.endswith(".safetensors") for n in names) else "*.bin"]


def load_modelscope(what: str) -> Any:
    """The module that speaks to ModelScope; ConfigError, beginning with `what`, where its library is not."""
    try:
        return importlib.import_module("swift.models.modelscope_hub")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} ModelScope's library is not installed ({error.name})",
            hint="pip install 'swiftune[hub]', or pass --use_hf true for HuggingFace",
        ) from error


@contextmanager
def explained(what: str, done: str, *, use_hf: bool, revision: str | None = None) -> Iterator[None]:
    """Whatever a hub's library raises becomes a ConfigError about `what`, which was to be `done` the hub.

    Each library has its own HTTP library below it, with its own exceptions.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise explain(error, what, done, "HuggingFace" if use_hf else "ModelScope", revision) from error


def explain(error: Exception, what: str, done: str, hub: str, revision: str | None) -> ConfigError:
    """A hub library's exception as one line with what to do."""
    kind, response = type(error).__name__, getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status_code", None)
    if isinstance(error, GatedRepoError):
        return ConfigError(
            f"{what} is gated on {hub}", hint="accept its terms on its page, then pass --hub_token or log in"
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{what} has no revision {revision} on {hub}")
    if isinstance(error, RepositoryNotFoundError) or "NotExist" in kind:
        return ConfigError(
            f"{what} does not exist on {hub}", hint="check the spelling; a private one needs --hub_token"
        )
    if isinstance(error, LocalTokenNotFoundError) or (kind == "AuthenticationError" and not status):
        return ConfigError(
            f"{what}: {hub} wants a token", hint="pass --hub_token, or log in with its own tool"
        )
    if status in (401, 403):
        reason = "does not know this token" if status == 401 else "does not allow it to this token"
        verb = "read" if done == "fetched from" else "write"
        return ConfigError(f"{what}: {hub} {reason}", hint=f"pass a --hub_token that may {verb} there")
    lines = str(error).strip().splitlines() or [kind]
    hint = NO_HUB_HINT if done == "fetched from" else None
    return ConfigError(f"{what} could not be {done} {hub}: {lines[0]}", hint=hint)


def check_reachable(endpoint: str) -> None:
    """Raises ConnectionError within seconds: left alone, the hubs' libraries try for half a minute."""
    try:
        urllib.request.urlopen(endpoint, timeout=REACHABLE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered; what it has to say comes from the library
    except OSError as error:
        raise ConnectionError(f"{endpoint} does not answer: {error}") from error
