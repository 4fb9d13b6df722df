"""Weight files for hosts that do not see this one's: they fetch them from a port that the training opens.

A file is served while it is offered, to whoever knows its path, which has 128 random bits; nothing else is.
Not here: who is told to fetch (vllm_client.py). Nothing of this needs vLLM.
"""

import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from filelock import FileLock

from swift.config.option import ConfigError
from swift.rollout.weights import roomy, roots

SILENCE_SECONDS = 60.0
PIECE_BYTES = 16 * 2**20


class Listener(ThreadingHTTPServer):
    """At an address of either kind."""

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)


class WeightPort:
    """Listens at `host` until it is closed."""

    def __init__(self, host: str, port: int) -> None:
        """`port`: 0 = any free one. Raises ConfigError where nobody can listen there."""
        offered: dict[str, Path] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                file = offered.get(self.path)
                if file is None:
                    self.send_error(404)
                    return
                with file.open("rb") as content:
                    self.send_response(200)
                    self.send_header("Content-Length", str(file.stat().st_size))
                    self.end_headers()
                    self.wfile.flush()
                    self.connection.sendfile(content)

            def log_message(self, *_: object) -> None:
                """Nobody wants a line for each file."""

        self.offered = offered
        try:
            self.server = Listener(host, port, Handler)
        except OSError as error:
            raise ConfigError(
                f"--vllm_server_group_port {port}: nobody can listen at {host}: {error.strerror}",
                hint="another program may use the port; without the flag any free one is taken",
            ) from error
        self.place = f"{f'[{host}]' if ':' in host else host}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True, name="weights").start()

    @contextmanager
    def offering(self, files: Sequence[Path]) -> Iterator[list[str]]:
        """URLs of files, good until the end of the block."""
        key = secrets.token_hex(16)
        names = {f"/{key}/{file.name}": file for file in files}
        self.offered.update(names)
        try:
            yield [f"http://{self.place}{name}" for name in names]
        finally:
            for name in names:
                del self.offered[name]

    def close(self) -> None:
        """Stops listening."""
        self.server.shutdown()
        self.server.server_close()


def fetch(urls: Sequence[str]) -> Iterator[Path]:
    """The files, one after the other. Processes of this host share what one of them has fetched.

    Raises OSError where a file cannot be had. They stay until `drop`.
    """
    folders = folders_of(urls)
    opener = build_opener(ProxyHandler({}))  # hosts of one job speak to each other directly
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)
    for url in urls:
        name = url.rpartition("/")[2]
        with FileLock(folders[-1] / f"{name}.lock"):
            have = [folder / name for folder in folders if (folder / name).is_file()]
            if not have:
                with opener.open(url, timeout=SILENCE_SECONDS) as content:
                    size = int(content.headers["Content-Length"])
                    path = roomy(folders, size) / name
                    part = path.with_suffix(".part")
                    with part.open("wb") as file:
                        shutil.copyfileobj(content, file, PIECE_BYTES)
                if part.stat().st_size != size:
                    raise URLError(f"{url} ended early")
                have = [part.rename(path)]
        yield have[0]


def drop(urls: Sequence[str]) -> None:
    """Deletes what was fetched; any process of the host may, once all have read it."""
    for folder in folders_of(urls):
        shutil.rmtree(folder, ignore_errors=True)


def folders_of(urls: Sequence[str]) -> list[Path]:
    """Where files of these URLs are put, the best place first: the same in every process of a host."""
    name = "swift-fetched-" + sha256(urls[0].rpartition("/")[0].encode()).hexdigest()[:32]
    return [root / name for root in roots()]
