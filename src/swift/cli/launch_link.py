"""The connection to one node: ssh, or a process beside this one where the address is this machine's.

Owns: how ssh is called, questions with their answers, and events of the command that runs there. What is said
over it, and by whom, is in launch_node.py. A password reaches ssh through a program that ssh calls for it and
that reads SSHPASS, so it is in no list of processes and in no file.
"""

import collections
import inspect
import json
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from swift.cli import launch_node
from swift.config.launch import LaunchRun
from swift.utils import env

CONNECT_SECONDS = 10
PING_SECONDS = 3.0
READ_PROGRAM = (
    "import os,sys;size=int(sys.stdin.buffer.readline());names={};"
    'exec(compile(sys.stdin.buffer.read(size),"swift-launch-node","exec"),names);names["main"](os.environ)'
)
ASK_PASS = '#!/bin/sh\nprintf "%s\\n" "$SSHPASS"\n'
KEYS = "try `ssh {host}`; ssh-copy-id brings your key there, --ssh_user says who you are"
# words of ssh, what they mean, what to do
REASONS = (
    ("permission denied", "refused: wrong key, password or user", KEYS),
    ("host key verification failed", "its host key has changed", "set up anew? ssh-keygen -R {host}"),
    ("could not resolve", "nobody knows this name", "use its address, or put it into /etc/hosts"),
    ("connection refused", "no sshd on that port", "start sshd there, or name --ssh_port"),
    ("timed out", "no answer: it is down, or ssh is filtered", "see that it is up and its ssh port open"),
    ("no route", "there is no way to it", "check the address, and that the machine is up"),
    ("unreachable", "there is no way to it", "check the address, and that the machine is up"),
    ("not found", "there is no such Python", "name one that is on every node with --python"),
    ("no such file", "there is no such Python", "name one that is on every node with --python"),
)  # fmt: skip


@dataclass
class LinkError(Exception):
    """A node did not answer, or answered that something went wrong: what, and what to do."""

    message: str
    mend: str = ""


class Link:
    """One node. `events` gets (link, kind, value): lines, exit, hangs of its command; `gone` at last."""

    def __init__(
        self, host: str, index: int, command: list[str], events: "Queue[tuple[Link, str, Any]]"
    ) -> None:
        self.host = host
        self.index = index
        self.events = events
        self.closed = False
        self.heard = time.monotonic()
        self.clock = 0.0  # seconds that the node's clock is ahead
        self.said: collections.deque[str] = collections.deque(maxlen=20)  # by ssh and the shell there
        self.answers: dict[int, Queue[dict[str, Any]]] = {}
        self.numbers = count()
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(local=command[0] != "ssh"),
            start_new_session=True,  # Ctrl-C is for the launcher: a connection that ends would end the run
        )
        program = inspect.getsource(launch_node).encode()
        with suppress(OSError):
            self._write(b"%d\n%s" % (len(program), program))
        self.listener = threading.Thread(target=self._read_errors, daemon=True)
        for thread in (
            self.listener,
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._ping, daemon=True),
        ):
            thread.start()

    def ask(self, do: str, *, seconds: float = 30.0, **arguments: Any) -> Any:
        """The answer to one question. LinkError when there is none, or when it is that something failed."""
        number = next(self.numbers)
        box = self.answers[number] = Queue()
        try:
            self._write(json.dumps({"do": do, "id": number, **arguments}).encode() + b"\n")
            answer = box.get(timeout=seconds) if not self.closed else {"gone": True}
        except (OSError, Empty):
            answer = {"gone": True} if self.closed or self.process.poll() is not None else {"late": True}
        if "late" in answer:
            raise LinkError(f"no answer within {seconds:.0f} s", "check its load and the network")
        if "gone" in answer:
            raise self.reason()
        if "error" in answer:
            raise LinkError(answer["error"])
        return answer["value"]

    def tell(self, do: str, **arguments: Any) -> None:
        """A question whose answer nobody waits for."""
        with suppress(LinkError):
            self.ask(do, seconds=0.0, **arguments)

    def reason(self) -> LinkError:
        """Why the connection ended, in words."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        self.listener.join(1.0)  # it hears what ssh said last after ssh has ended
        text = " ".join(self.said).lower()
        for words, meaning, mend in REASONS:
            if words in text:
                return LinkError(meaning, mend.format(host=self.host))
        return LinkError(f"the connection ended: {self.said[-1] if self.said else 'without a word'}")

    def _write(self, data: bytes) -> None:
        assert self.process.stdin
        with self.lock:
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def _ping(self) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed
            while not self.closed:
                self._write(b'{"do": "ping"}\n')
                time.sleep(PING_SECONDS)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            try:
                message = json.loads(line)
                assert isinstance(message, dict)
            except (ValueError, AssertionError):  # a greeting that the shell there prints
                self.said.append(line.decode(errors="replace").strip())
                continue
            self.heard, self.clock = time.monotonic(), message["now"] - time.time()
            if "id" in message:
                box = self.answers.pop(message["id"], None)
                if box:
                    box.put(message)
            for kind in ("line", "exit", "hang"):
                if kind in message:
                    self.events.put((self, kind, message[kind]))
        self.closed = True
        for box in list(self.answers.values()):
            box.put({"gone": True})
        self.events.put((self, "gone", None))

    def _read_errors(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            text = line.decode(errors="replace").strip()
            if text:
                self.said.append(text)


def open_links(
    run: LaunchRun, hosts: Iterable[str], events: "Queue[tuple[Link, str, Any]]", python: str
) -> list[Link]:
    """A connection to every node; whether it stands shows in the first answer."""
    return [Link(host, i, command_for(run, host, python), events) for i, host in enumerate(hosts)]


def ask_all(links: Iterable[Link], do: str, *, seconds: float = 30.0, **arguments: Any) -> dict[Link, Any]:
    """The answers of all nodes, asked at once; a LinkError where one failed. Callables: per node."""

    def ask(link: Link) -> Any:
        own = {k: v(link) if isinstance(v, Callable) else v for k, v in arguments.items()}  # type: ignore[arg-type]
        try:
            return link.ask(do, seconds=seconds, **own)
        except LinkError as error:
            return error

    links = list(links)
    with ThreadPoolExecutor(max(1, len(links))) as pool:
        return dict(zip(links, pool.map(ask, links), strict=True))


def close_all(links: Iterable[Link]) -> None:
    """Ends the connections, upon which the nodes end what still runs there; waits until they have."""
    links = list(links)
    for link in links:
        with suppress(OSError):
            assert link.process.stdin
            link.process.stdin.close()
    deadline = time.monotonic() + CONNECT_SECONDS
    for link in links:
        try:
            link.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            link.process.kill()


def command_for(run: LaunchRun, host: str, python: str) -> list[str]:
    """The words that start the node's program."""
    program = [python, "-u", "-c", READ_PROGRAM]
    if not run.ssh_user and not run.ssh_port and is_own(host):
        return program
    options = [
        "-T", "-o", "LogLevel=ERROR", "-o", f"ConnectTimeout={CONNECT_SECONDS}",
        "-o", "StrictHostKeyChecking=accept-new", "-o", "ServerAliveInterval=10",
    ]  # fmt: skip
    options += ["-o", "NumberOfPasswordPrompts=1" if env.read("SSHPASS") else "BatchMode=yes"]
    for flag, value in (("-F", run.ssh_config), ("-p", run.ssh_port), ("-l", run.ssh_user)):
        options += [flag, str(value)] if value else []
    return ["ssh", *options, "--", host, f"exec {shlex.join(program)}"]


def is_own(host: str) -> bool:
    """Whether the address or name is this machine's."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _environment(local: bool) -> dict[str, str]:
    variables = env.inherited()
    if local or "SSHPASS" not in variables:
        variables.pop("SSHPASS", None)  # the command that runs here has no use for it
        return variables
    # DISPLAY: OpenSSH before 8.4 asks the program only where it believes in a screen.
    return {
        **variables,
        "SSH_ASKPASS": f"{ask_pass_folder().name}/ask",
        "SSH_ASKPASS_REQUIRE": "force",
        "DISPLAY": variables.get("DISPLAY", ":0"),
    }


@cache
def ask_pass_folder() -> "tempfile.TemporaryDirectory[str]":
    """A directory with the program that ssh calls for a password, which is not in it."""
    folder = tempfile.TemporaryDirectory(prefix="swift-askpass-")
    path = Path(folder.name) / "ask"
    path.write_text(ASK_PASS, encoding="utf-8")
    path.chmod(0o700)
    return folder
