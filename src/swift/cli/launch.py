"""`swift launch`: one command line for all nodes of a job.

Owns: what the command behind it needs of the nodes, and the order: connecting, checking, running, and running
again. Not here: connections (launch_link.py), checks (launch_checks.py), what runs (launch_watch.py).
"""

import getpass
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any

from swift.cli import main
from swift.cli.flags import split_arguments
from swift.cli.launch_checks import Plan, Report, check_nodes, node_variables, settle
from swift.cli.launch_cluster import enter, find_place
from swift.cli.launch_link import Link, LinkError, ask_all, close_all, open_links
from swift.cli.launch_watch import STOPPED, Failure, Output, Watch
from swift.config.launch import LaunchRun
from swift.config.layout import DEGREES
from swift.config.option import ConfigError
from swift.config.plan import TRAINING
from swift.utils import env

MODULES = {"swift": "swift", "megatron": "swift.cli.megatron"}  # behind `python -m`
PASSWORD = ("--ssh_password", "--ssh-password")
INPUTS = re.compile(  # flags whose values are files or directories that training reads
    r"(.*_)?(model|models|dataset|adapters|adapter_load)|load|resume_from_checkpoint|.*plugins|custom_register_path"
    r"|custom_dataset_info|deepspeed|reward_funcs"
)
AMOUNT = re.compile(r"#\d+$")  # rows to take of a dataset


def split_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and the command behind them. Takes a password out of the arguments."""
    at = find_wrapped(argv)
    return _take_password(argv[:at], argv[at:]), argv[at:]


def find_wrapped(argv: list[str]) -> int:
    """Where the command begins that the arguments before it wrap: at a program that is no flag's value."""
    switches = ("--check_only", "--check-only", *PASSWORD)
    for i, word in enumerate(argv):
        before = argv[i - 1] if i else ""
        is_value = before.startswith("--") and "=" not in before and before not in switches
        if word in MODULES and not is_value:
            return i
    return len(argv)


def _take_password(own: list[str], behind: list[str]) -> list[str]:
    """Without --ssh_password. It moves to SSHPASS; where it stood among the arguments, they are replaced."""
    first = next((i for i, word in enumerate(own) if word.startswith("--")), len(own))
    given = split_arguments(own[first:])
    secret = [item for item in given if item.typed in PASSWORD]
    rest = [word for item in given if item not in secret for word in (item.typed, *item.words)]
    if any(item.words for item in secret):
        env.put({"SSHPASS": " ".join(secret[-1].words)})
        os.execv(sys.executable, [sys.executable, "-m", "swift", *own[:first], *rest, *behind])
    elif secret:
        env.put({"SSHPASS": getpass.getpass("password for ssh: ")})
    return own[:first] + rest if secret else own


def run_launch(run: LaunchRun) -> int:
    """Entry of `swift launch`; the exit code of the command."""
    program, argv = run.command[0], list(run.command[1:])
    hosts = run.hosts
    if not hosts:
        place = find_place()
        if place is None:
            raise ConfigError(
                "swift launch is not told which nodes there are",
                hint="--ips ADDRESS,ADDRESS or --hostfile FILE; in a Slurm job: srun swift launch ...",
            )
        main.note(f"node {place.rank} of {place.nodes}, from {place.maker}; node 0 is {place.master}")
        enter(place, port=run.port, processes=run.nproc_per_node)
        return main.run(argv, program=program)
    values = main.understand(program, argv)[2]  # so that a mistake is told before any node is asked
    if run.ssh_password:
        env.put({"SSHPASS": run.ssh_password})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends a launch as Ctrl-C does
    return Launch(run, hosts, values).carry_out()


class Launch:
    """A command, the nodes for it, and its starts."""

    def __init__(
        self, run: LaunchRun, hosts: Sequence[tuple[str, int | None]], values: dict[str, Any]
    ) -> None:
        self.run = run
        self.program, *self.argv = run.command
        self.values = values
        self.events: Queue[tuple[Link, str, Any]] = Queue()
        self.began = time.time()
        own = dict(item.split("=", 1) for item in run.env)
        default = run.nproc_per_node or int(env.read("NPROC_PER_NODE") or 0) or None
        self.plan = Plan(
            variables={**env.travelling(), **own},
            workdir=run.workdir or str(Path.cwd()),
            mark=secrets.token_hex(8),
            port=run.port,
            processes={host: slots or default for host, slots in hosts},
            shared=self._output_root(),
            files=self._files(),
        )

    def carry_out(self) -> int:
        """Connects, checks, and runs as often as --max_restarts allows; the exit code."""
        links, report = self._connect(list(self.plan.processes), checks=True)
        try:
            if report.failed or self.run.check_only:
                for line in report.lines():
                    print(line, file=sys.stderr if report.failed else sys.stdout, flush=True)
            if report.failed:
                bad = sorted({finding.host for finding in report.failed})
                raise ConfigError(f"not ready: {', '.join(bad)}; nothing was started")
            if self.run.check_only:
                return 0
            for finding in report.findings:
                main.note(f"warning: {finding.host}: {finding.text}")
            return self._run_all(links, report)
        finally:
            close_all(links)

    def _connect(self, hosts: list[str], *, checks: bool) -> tuple[list[Link], Report]:
        links = open_links(self.run, hosts, self.events, self.run.python or sys.executable)
        report = settle(links, self.plan)
        if checks:
            check_nodes(links, self.plan, report)
        return links, report

    def _run_all(self, links: list[Link], report: Report) -> int:
        folder = Path(self.run.log_dir or Path("launch_logs") / time.strftime("%Y%m%d-%H%M%S")).expanduser()
        output = Output(folder)
        main.note(f"{len(links)} node(s) are ready; all output goes to {folder.absolute()}")
        checkpoint: str | None = None
        for left in range(self.run.max_restarts, -1, -1):
            failure = self._run_once(links, report, output, checkpoint)
            if failure is None:
                return 0
            _tell(failure, folder)
            if not left or not failure.may_pass:
                return failure.code
            links[:] = self._gather_again(links, report)
            checkpoint = self._last_checkpoint(links[0]) or checkpoint
            where = checkpoint or "the beginning, no checkpoint was written yet"
            main.note(
                f"starting again on {len(links)} node(s) from {where}; restarts left after it: {left - 1}"
            )
            output.clear()
        raise AssertionError("the last start returns")

    def _run_once(
        self, links: list[Link], report: Report, output: Output, checkpoint: str | None
    ) -> Failure | None:
        going_on = ["--resume_from_checkpoint", checkpoint] if checkpoint else []
        words = ["-m", MODULES[self.program], *self.argv, *going_on]
        output.single = len(links) == 1 and report.processes[links[0].host] == 1

        def variables(link: Link) -> dict[str, str]:
            return node_variables(link, links, self.plan.port, report.processes, report.interfaces)

        answers = ask_all(links, "start", words=words, variables=variables, patience=self.run.hang_timeout)
        for link, answer in answers.items():
            if isinstance(answer, LinkError):
                return Failure(1, f"{link.host}: {answer.message}")
        return Watch(links, self.events, output).follow()

    def _gather_again(self, links: list[Link], report: Report) -> list[Link]:
        """The nodes for another start: all of them, or those that are left where the layout allows it."""
        close_all(links)
        while not self.events.empty():
            self.events.get_nowait()
        links, found = self._connect([link.host for link in links], checks=False)
        failed = {finding.host: finding.text for finding in found.failed}
        for link in links:
            if link.host in failed:
                main.note(f"warning: {link.host}: {failed[link.host]}")
        left = [link for link in links if link.host not in failed]
        world = sum(report.processes[link.host] for link in left)
        share = self._processes_that_share_a_model()
        if not left or world % share:
            raise ConfigError(
                f"{world} process(es) on {len(left)} nodes are left; the layout needs a multiple of {share}",
                hint="mend the node and go on with --resume_from_checkpoint",
            )
        close_all(link for link in links if link not in left)
        return left

    def _last_checkpoint(self, head: Link) -> str | None:
        if self.plan.shared is None:
            return None
        since = self.began + head.clock
        found = ask_all([head], "checkpoint", root=self.plan.shared, since=since)[head]
        return found if isinstance(found, str) else None

    def _processes_that_share_a_model(self) -> int:
        names = (*DEGREES[:3], "sequence_parallel_size")
        return math.prod(int(self.values.get(name) or 1) for name in names)

    def _output_root(self) -> str | None:
        """Where checkpoints will go, relative to the working directory; None for commands that write none."""
        named = self.values.get("output_dir")
        if named or self.argv[0] not in TRAINING:
            return named
        if self.values.get("resume_from_checkpoint"):  # a run goes on in its own directory
            path = Path(self.values["resume_from_checkpoint"])
            return str(path.parent if path.name.startswith("checkpoint-") else path)
        name = Path(str(self.values.get("model") or self.values.get("mcore_model"))).name
        return f"{'megatron_output' if self.program == 'megatron' else 'output'}/{name}"

    def _files(self) -> dict[str, str]:
        given = ((name, value) for name, value in self.values.items() if INPUTS.fullmatch(name))
        items = (
            (name, item)
            for name, value in given
            for item in (value if isinstance(value, tuple) else (value,))
        )
        found = {AMOUNT.sub("", item): f"--{name} {item}" for name, item in items if isinstance(item, str)}
        if len(self.argv) > 1 and self.argv[1].endswith(main.CONFIG_SUFFIXES):
            found[self.argv[1]] = self.argv[1]
        return found


def _tell(failure: Failure, folder: Path) -> None:
    """The first error, with the lines that led to it."""
    if failure.code == STOPPED:
        main.note(failure.text)
        return
    lines = [f"  {line}" for line in failure.lines]
    lines += [] if failure.told else [f"error: {failure.text}"]
    lines.append(f"hint: all nodes were stopped; what each process said is in {folder.absolute()}")
    print("\n".join(lines), file=sys.stderr, flush=True)
