"""`swift deploy`: from flags to a port that answers, and to a clean end.

Everything that can be wrong with flags, files, keys and the port is found before weights are loaded.
"""

import asyncio
import contextlib
import logging
import random
import signal
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from swift.config.option import ConfigError
from swift.config.runs import DeployRun
from swift.config.serve import ServeOptions
from swift.data.datasets import use_plugins
from swift.infer.run import open_result_file
from swift.infer.server import Server, Serving, build_app
from swift.infer.server_embedding import EmbeddingServer
from swift.infer.server_models import Loaded, load_models, load_scorer, make_plan
from swift.infer.server_vllm import serve_through_vllm
from swift.infer.service import Service
from swift.utils import env
from swift.utils.log import say, warn

LOOPBACK = ("127.0.0.1", "::1", "localhost")
BACKLOG = 2048  # connections that the system holds for us
LAST_SECONDS = 5.0  # for responses to leave after the answers have ended
Fail = Callable[[BaseException], None]
Opener = Callable[[Fail], Serving]  # what the port answers with, from the event loop that it is called in


def run_deploy(run: DeployRun) -> int:
    """Serves until a signal; returns the exit code."""
    use_plugins(run.plugins)
    options = run.serve
    if options.log_level != "info":
        env.put({"SWIFT_LOG_LEVEL": options.log_level})
    check_certificate(options)
    if options.infer_backend == "vllm":
        return serve_through_vllm(run)
    with contextlib.closing(open_socket(options)) as listener:
        plan = make_plan(run)
        open_result_file(Path(options.result_path) if options.result_path else None)
        if plan.embeds:
            name, scorer = plan.sources[0].name, load_scorer(plan)
            opener: Opener = lambda _: EmbeddingServer(name, scorer, options)  # noqa: E731
            return asyncio.run(serve(opener, options, listener))
        opener = partial(open_chats, load_models(plan), options, run.generation.seed)
        return asyncio.run(serve(opener, options, listener))


def open_chats(loaded: Loaded, options: ServeOptions, seed: int, fail: Fail) -> Server:
    """What answers conversations, from the event loop that calls this."""
    limit = options.max_batch_size + options.max_queue_size
    service = Service(loaded.decoders, limit=limit, activate=loaded.activate, fail=fail)
    return Server(loaded.models, service, options, partial(random.Random(seed).getrandbits, 63))


def check_certificate(options: ServeOptions) -> None:
    """Raises ConfigError for files that https cannot be served with."""
    if not options.ssl_certfile or not options.ssl_keyfile:
        return
    for flag, name in (("ssl_certfile", options.ssl_certfile), ("ssl_keyfile", options.ssl_keyfile)):
        if not Path(name).is_file():
            raise ConfigError(f"--{flag} {name} is no file")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            options.ssl_certfile, options.ssl_keyfile
        )
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"--ssl_certfile {options.ssl_certfile} and --ssl_keyfile {options.ssl_keyfile}: {error}",
            hint="a certificate and its private key, both PEM",
        ) from error


def open_socket(options: ServeOptions) -> socket.socket:
    """The port, held from now on; connections are taken once the model can answer. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(
            f"--host {options.host}: {error.strerror}", hint="an address of this machine"
        ) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an ended server does not hold its port
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise taken(options, error) from error
    return listener


class _Web(uvicorn.Server):
    """uvicorn's server, which tells the service of signals."""

    def __init__(self, config: uvicorn.Config, service: Any, grace_seconds: float) -> None:
        super().__init__(config)
        self.service = service
        self.grace_seconds = grace_seconds
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets answers finish, the second ends everything."""
        super().handle_exit(sig, frame)
        self.interrupted = sig == signal.SIGINT
        if not self.force_exit:
            self.service.drain(self.grace_seconds)


async def serve(opener: Opener, options: ServeOptions, listener: socket.socket) -> int:
    """Answers requests until a signal: the exit code. When the model fails, that error is raised."""
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        web.should_exit = True

    logging.basicConfig(format="%(message)s")  # for uvicorn
    server = opener(fail)
    service = server.service
    config = uvicorn.Config(
        build_app(server), log_config=None,
        log_level="warning" if options.log_level == "info" else options.log_level,
        access_log=options.log_level in ("debug", "trace"), lifespan="off",
        ssl_keyfile=options.ssl_keyfile, ssl_certfile=options.ssl_certfile,
        timeout_graceful_shutdown=round(options.shutdown_timeout + LAST_SECONDS),
    )  # fmt: skip
    web = _Web(config, service, options.shutdown_timeout)
    # uvicorn raises its signals again at its end; whoever asks us to end has then got what he wanted.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, web.handle_exit)
    listen(listener, options)
    announce(server, options, listener)
    reporter = asyncio.create_task(report(service, options.log_interval))
    try:
        await web.serve(sockets=[listener])
    finally:
        reporter.cancel()
        service.close()
    if failures:
        raise failures[0]
    return 130 if web.interrupted else 0


def listen(listener: socket.socket, options: ServeOptions) -> None:
    """Takes connections from now on: early ones wait for uvicorn."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # another server has taken the port while the model was loaded
        raise taken(options, error) from error


def taken(options: ServeOptions, error: OSError) -> ConfigError:
    return ConfigError(
        f"--host {options.host} --port {options.port}: {error.strerror}",
        hint="stop what uses it, or name another port; 0 takes one that is free",
    )


def announce(server: Serving, options: ServeOptions, listener: socket.socket) -> None:
    """Who may reach what, and where."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if options.ssl_certfile else "http"
    name = f"[{host}]" if ":" in host else host
    say(f"serving {', '.join(server.models)} at {scheme}://{name}:{port}/v1")
    if host in LOOPBACK:
        say("only this machine can reach it; --host 0.0.0.0 lets others in")
    elif not options.api_key:
        warn("everyone who can reach this machine may ask; --api_key sets a key")


async def report(service: Any, interval_seconds: float) -> None:
    """A line now and then, while there is something to tell."""
    if interval_seconds <= 0:
        return
    before, began = dict(service.totals), time.monotonic()
    while True:
        await asyncio.sleep(interval_seconds)
        now, ended = dict(service.totals), time.monotonic()
        if now != before or service.num_running + service.num_waiting:
            names = ("requests_answered", "prompt_tokens", "generated_tokens")
            rates = [(now.get(n, 0) - before.get(n, 0)) / (ended - began) for n in names]
            say(
                f"{rates[0]:.1f} requests/s, {rates[1]:.0f} prompt tokens/s, {rates[2]:.0f} tokens/s, "
                f"{service.num_running} answers running, {service.num_waiting} waiting"
            )
        before, began = now, ended
