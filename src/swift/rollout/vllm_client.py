"""Answers from vLLM servers that `swift rollout` started; new weights go to them as files.

Servers of this host read the files, those of other hosts fetch them from a port of this one. Every rank asks
for its own requests; weights and the wait for a server are rank 0's.
"""

import http.client
import json
import select
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.engines.ranks import Ranks
from swift.rollout.types import Completion, Request
from swift.rollout.vllm_server import SERVED_NAME
from swift.rollout.vllm_terms import Terms
from swift.rollout.weight_port import WeightPort
from swift.rollout.weights import folder_for_weights, write_buckets
from swift.utils.log import say

AT_ONCE = 256  # requests under way from one rank
PROBE_SECONDS = 10.0
PAUSE_SECONDS = 0.5
STARTING, ASKING, SENDING = "at the start", "while answers were asked for", "while weights were sent"


class VllmServers:
    """Servers that take turns: `swift.rollout.protocol.RolloutEngine`. Called by all ranks."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        ranks: Ranks,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        timeout_seconds: float,
        weight_port: int = 0,
        process: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        """Waits until all of them answer. `process`: of a server that belongs to this job.

        timeout_seconds: until a server has started; later, without a sign of life from it. `weight_port`: of
        this host, for servers elsewhere; 0 = any. Raises ConfigError where a server does not come, or cannot
        have this host's files.
        """
        self.servers = [Server(url, timeout_seconds) for url in urls]
        self.ranks, self.terms = ranks, Terms(tokenizer, tuple(stop_token_ids))
        self.process, self.version = process, 0
        self.weight_port = weight_port
        self.ports: dict[str, WeightPort] = {}  # by address of this host
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="rollout")
        if ranks.is_main:
            for server in self.servers:
                server.wait(process)
                server.fetches_from = self._open_port(server)
        self.context = ranks.share(min(s.context() for s in self.servers) if ranks.is_main else 0)

    def _open_port(self, server: "Server") -> WeightPort | None:
        """Where the server fetches weights from; None where it sees the files of this host."""
        with folder_for_weights() as folders:
            probe = folders[0] / "probe"
            probe.touch()
            if set(server.call("can_read", str(probe), phase=STARTING)) == {"True"}:
                return None
            address = server.own_address()
            if address not in self.ports:
                self.ports[address] = WeightPort(address, self.weight_port)
            port = self.ports[address]
            with port.offering([probe]) as [url]:
                said = set(server.call("can_fetch", url, phase=STARTING))
        if said != {"True"}:
            raise ConfigError(
                f"the rollout server {server.place} neither sees the files of this host nor can fetch them "
                f"from {port.place}: {' '.join(sorted(said - {'True'}))}",
                hint="open that port to it; --vllm_server_group_port names a certain one",
            )
        say(f"the rollout server {server.place} fetches weights from {port.place}")
        return port

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        longest = max((len(request.token_ids) for request in requests), default=0)
        if longest >= self.context:
            raise ConfigError(
                f"a prompt has {longest} tokens, and the rollout server takes {self.context} with the answer",
                hint="start it with a larger --vllm_max_model_len, or drop such rows with --max_length",
            )
        turns = (self.servers[(self.ranks.rank + i) % len(self.servers)] for i in range(len(requests)))
        try:
            return list(self.pool.map(self._ask, turns, requests))
        except ConfigError:
            for server in self.servers:
                server.given_up = True  # else this process would not end before all other answers are there
            raise

    def _ask(self, server: "Server", request: Request) -> list[Completion]:
        body = self.terms.sampling(request) | {
            "model": SERVED_NAME,
            "prompt": request.token_ids,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        choices = server.ask("POST", "/v1/completions", body, phase=ASKING)["choices"]
        choices.sort(key=lambda choice: choice["index"])
        return [self.terms.read_choice(request, choice, self.version) for choice in choices]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.ranks.barrier()  # nobody is being answered any more
        if self.ranks.is_main:
            self._send(iter(weights))
        else:
            for _ in weights:
                pass
        self.ranks.barrier()
        self.version = version

    def _send(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        with folder_for_weights() as folders:
            try:
                files = write_buckets(weights, folders)
            except OSError as error:
                raise ConfigError(f"weights for the rollout servers: {folders[-1]}: {error}") from error
            list(self.pool.map(lambda server: server.take_weights(files), self.servers))
        for server in self.servers:
            # Keys and values of the old weights would go on answering for prompts that come again.
            if not server.ask("POST", "/reset_prefix_cache", {}, phase=SENDING).get("success", True):
                raise ConfigError(
                    f"the rollout server {server.place} is answering someone else {SENDING}",
                    hint="a training needs servers of its own",
                )

    def sleep(self) -> None:
        """Servers have GPUs of their own."""

    def wake(self) -> None:
        """Servers have GPUs of their own."""

    def close(self) -> None:
        for server in self.servers:
            server.given_up = True  # --async_generate: nobody waits for what is under way
        self.pool.shutdown(cancel_futures=True)
        for port in self.ports.values():
            port.close()
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


class Server:
    """One server, and what is said when it does not answer. `kind` is what messages call it."""

    def __init__(
        self, url: str, timeout_seconds: float, *, kind: str = "rollout server", way: str = "swift rollout"
    ) -> None:
        """`way`: the command that starts one."""
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 8000
        self.place, self.kind, self.way = f"{self.host}:{self.port}", kind, way
        self.timeout_seconds = timeout_seconds
        self.given_up = False
        self.fetches_from: WeightPort | None = None  # where it does not see the files of this host

    def own_address(self) -> str:
        """This host's, as the server can reach it: that from which the server is reached."""
        with socket.create_connection((self.host, self.port), self.timeout_seconds) as connection:
            return str(connection.getsockname()[0])

    def take_weights(self, files: Sequence[Path]) -> None:
        """Has every worker of it load them."""
        if self.fetches_from is None:
            self.call("receive_files", *map(str, files), phase=SENDING)
            return
        with self.fetches_from.offering(files) as urls:
            self.call("receive_urls", *urls, phase=SENDING)
            self.call("drop_urls", *urls, phase=SENDING)

    def wait(self, process: "subprocess.Popen[bytes] | None" = None) -> None:
        """Until it has loaded its model."""
        end = time.monotonic() + self.timeout_seconds
        told = False
        while not self._is_up():
            if process is not None and process.poll() is not None:
                raise ConfigError(
                    f"the rollout server {self.place} ended with {process.returncode} before it answered",
                    hint="its own lines above say why",
                )
            if time.monotonic() > end:
                raise ConfigError(
                    f"no rollout server answered at {self.place} for {self.timeout_seconds:g} s",
                    hint="start one with swift rollout; --vllm_server_timeout waits longer",
                )
            if not told:
                say(f"waiting for the rollout server {self.place}")
            told = True
            time.sleep(PAUSE_SECONDS)

    def _is_up(self) -> bool:
        try:
            return self._send("GET", "/health", None, min(PROBE_SECONDS, self.timeout_seconds))[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def context(self) -> int:
        """Tokens of a prompt with its answer."""
        return int(self.ask("GET", "/v1/models", None, phase=STARTING)["data"][0]["max_model_len"])

    def call(self, method: str, *arguments: str, phase: str) -> list[Any]:
        """What each worker of the server returns from a method of vllm_worker.py."""
        body = {"method": method, "args": list(arguments)}
        answer = self.ask("POST", "/collective_rpc", body, phase=phase)
        results: list[Any] = answer.get("results", [])
        return results

    def ask(self, verb: str, path: str, body: dict[str, Any] | None, *, phase: str) -> dict[str, Any]:
        """The JSON of an answer; ConfigError in one line where there is none."""
        try:
            status, data = self._send(verb, path, body, self.timeout_seconds)
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(
                f"the {self.kind} {self.place} was lost {phase}: {str(error) or type(error).__name__}",
                hint="what it printed last says why",
            ) from error
        if status >= 400:
            raise ConfigError(
                f"the {self.kind} {self.place} refused {path} {phase}: {tell(data)}",
                hint=f"is it `{self.way}` of this version? other servers do not know all ways"
                if status == 404
                else None,
            )
        found: dict[str, Any] = json.loads(data) if data else {}
        return found

    def _send(self, verb: str, path: str, body: Any, timeout_seconds: float) -> tuple[int, bytes]:
        """Status and content. A long answer is waited for as long as the server is healthy meanwhile."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_seconds)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(verb, path, text, {"Content-Type": "application/json"})
            waiting = select.poll()
            waiting.register(connection.sock, select.POLLIN)
            heard = time.monotonic()
            while not waiting.poll(1000 * min(timeout_seconds, PROBE_SECONDS)):
                if self.given_up:
                    raise TimeoutError("another request failed")
                if time.monotonic() >= heard + timeout_seconds:
                    if path == "/health" or not self._is_up():
                        raise TimeoutError(f"no sign of life for {timeout_seconds:g} s")
                    heard = time.monotonic()
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def tell(data: bytes) -> str:
    """The first line of an error, of whichever form."""
    text = data.decode(errors="replace")
    try:
        found = json.loads(text)
        text = found.get("error", found).get("message") or found.get("detail") or text
    except (ValueError, AttributeError):
        pass
    return str(text).strip().splitlines()[0][:300] if text.strip() else "no reason given"
