"""ModelScope downloads. Imported by name only where an id is asked of that hub: the library is an extra."""

import urllib.error
import urllib.request
from pathlib import Path

from modelscope import snapshot_download
from modelscope.hub.api import HubApi

REACHABLE_SECONDS = 5


def fetch(name: str, *, revision: str | None, token: str | None) -> Path:
    """Downloads a repository into ModelScope's own cache; OSError within seconds when the hub is silent."""
    check_reachable(str(HubApi().endpoint))
    if token:
        HubApi().login(token)
    return Path(snapshot_download(name, revision=revision))


def check_reachable(endpoint: str) -> None:
    """Raises ConnectionError within seconds: left alone, the library tries for half a minute."""
    try:
        urllib.request.urlopen(endpoint, timeout=REACHABLE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered; what it has to say about the model comes from the library
    except OSError as error:
        raise ConnectionError(f"{endpoint} does not answer: {error}") from error
