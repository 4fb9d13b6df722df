"""Runs swift's command lines in processes that are forked from one that has imported everything.

A process of its own pays seconds for importing torch and transformers; a fork pays nothing. `Workers` starts
the server below once for a test session and asks it for one job after another: a command line, on one process
or several, which find each other as under torchrun. The start through torchrun itself is not covered.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL for the processes that a failed one leaves behind


@dataclass(frozen=True)
class Finished:
    """How a job ended."""

    code: int  # of the process that failed first, as torchrun would give it (a signal is negative); else 0
    codes: list[int]  # by rank
    stdout: str  # of all processes, by rank
    stderr: str


class Workers:
    """The server, and what to ask of it. One job at a time."""

    def __init__(self, scratch: Path, *modules: str) -> None:
        self.scratch = scratch
        self.jobs = 0
        # -c and not this file: a fork's __main__ is then no module that swift might start processes from.
        command = [sys.executable, "-c", "import sys, workers; workers.serve(*sys.argv[1:])", *modules]
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
        self.server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        arguments: list[str],
        processes: int = 1,
        *,
        hook: str | None = None,
        hook_arguments: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        timeout_seconds: float = 300,
    ) -> Finished:
        """`swift ARGUMENTS` (or `megatron ...`) on so many processes; without arguments, the hook alone.

        `hook`: `file.py:function`, called in every process before the command, with `rank` and arguments.
        Jobs of several processes have RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as under torchrun.
        """
        self.jobs += 1
        folder = self.scratch / str(self.jobs)
        folder.mkdir()
        job = {
            "arguments": arguments, "processes": processes, "environment": environment or {},
            "hook": hook, "hook_arguments": hook_arguments or {},
            "timeout_seconds": timeout_seconds, "folder": str(folder),
        }  # fmt: skip
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        assert line, f"the server ended with {self.server.wait()}"
        answer = json.loads(line)
        texts = [
            "".join((folder / f"{rank}.{name}").read_text(errors="replace") for rank in range(processes))
            for name in ("out", "err")
        ]
        return Finished(answer["first"], answer["codes"], *texts)

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()


def serve(*modules: str) -> None:
    """Answers jobs from stdin until it is closed; `modules` are imported before the first one."""
    import torch.distributed.fsdp
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import swift.export.run
    import swift.infer.run
    import swift.train.run
    import swift.train.trackers

    for name in modules:
        importlib.import_module(name)
    torch.set_num_threads(1)
    # The pictures of the curves take longer than tiny models train; tests/e2e/test_sft.py looks at them.
    swift.train.trackers.save_plot = lambda *_: None
    for line in sys.stdin:
        job = json.loads(line)
        ranks = [start(job, rank, port) for port in [free_port()] for rank in range(job["processes"])]
        first, codes = wait(ranks, time.monotonic() + job["timeout_seconds"])
        print(json.dumps({"first": first, "codes": codes}), flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(job: dict[str, Any], rank: int, port: int) -> int:
    """Forks one process of a job; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work(job, rank, port)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def work(job: dict[str, Any], rank: int, port: int) -> int:
    """Inside the fork: output into files, the environment of torchrun, the command line."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{job['folder']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["processes"] > 1:
        world = str(job["processes"])
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    os.environ.update(job["environment"])
    if job["hook"]:
        file_name, function = job["hook"].rsplit(":", 1)
        spec = importlib.util.spec_from_file_location("hook", file_name)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        getattr(module, function)(rank=rank, **job["hook_arguments"])
    from swift.cli.main import run

    arguments = job["arguments"]
    if arguments[:1] == ["megatron"]:
        return run(arguments[1:], program="megatron")
    return run(arguments) if arguments else 0


def wait(pids: list[int], deadline: float) -> tuple[int, list[int]]:
    """The exit code of the first that failed, and those of all. One failure ends the others, as there."""
    codes: dict[int, int] = {}
    first, ordered = 0, 0.0
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                first = first or codes[pid]
        now = time.monotonic()
        late = now > deadline or (ordered and now > ordered + GRACE_SECONDS)
        if late or (first and not ordered):
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            ordered = ordered or now
        time.sleep(0.005)
    return first, [codes[pid] for pid in pids]
