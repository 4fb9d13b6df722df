"""ModelScope: downloads and uploads. Imported by name only where that hub is asked: the library is an extra.

Tokens are handed over with each call, so that none is written to the disk.
"""

import logging
from pathlib import Path

from modelscope_hub import HubApi, HubConfig

from swift.models.hub import IGNORED_FILES, check_reachable, choose_files
from swift.models.push import Destination
from swift.utils import env


def fetch(name: str, *, revision: str | None, token: str | None) -> Path:
    """Downloads a repository into ModelScope's own cache, going on with files that are there in part.

    OSError within seconds when the hub is silent.
    """
    api = open_hub(token)
    api = HubApi(token=token, config=HubConfig(endpoint=api.resolve_endpoint_for_read(name)))
    files = api.list_repo_files(name, "model", revision=revision)
    listed = [{"Path": f.path, "Size": f.size, "Sha256": f.sha256} for f in files if f.type != "tree"]
    path = api.download_repo(
        name,
        "model",
        revision=revision,
        file_list=listed,
        allow_patterns=choose_files([f.path for f in files]),
        ignore_patterns=list(IGNORED_FILES),
    )
    return Path(path)


def find_user(token: str | None) -> str:
    return str(open_hub(token).whoami().username)


def upload(directory: Path, where: Destination) -> str:
    """All files of a directory into the repository, made where it is not there; its address."""
    api = HubApi(token=where.token, config=HubConfig())
    if not api.repo_exists(where.name, "model"):
        api.create_repo(where.name, "model", visibility="private" if where.private else "public")
    api.upload_folder(where.name, "model", directory, commit_message=where.message, use_cache=False)
    return f"{HubConfig().endpoint}/models/{where.name}"


def open_hub(token: str | None) -> HubApi:
    if not env.is_on("SWIFT_DEBUG"):
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    config = HubConfig()  # the library's own is of the time when it was imported
    check_reachable(str(config.endpoint))
    return HubApi(token=token, config=config)
