"""`swift launch` before it connects: its arguments, host files, cluster environments."""

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from swift.cli import launch, main
from swift.cli.launch_checks import Finding, Plan, Report, _check_clock, _check_machine
from swift.cli.launch_cluster import Place, expand_nodes, find_place
from swift.cli.launch_link import Link, LinkError, ask_pass_folder, close_all, command_for
from swift.cli.launch_watch import Output, Trouble, Watch
from swift.cli.main import run
from swift.config.launch import LaunchRun
from swift.utils import env

SFT = ["swift", "sft", "--model", "m", "--dataset", "d.jsonl"]
NAMES = (
    "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "WORLD_SIZE", "RANK",
    "LOCAL_RANK", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST", "SLURM_NNODES", "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_NODEID", "PET_NNODES", "PET_NODE_RANK",
    "PET_NPROC_PER_NODE", "SSHPASS",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.main, "QUIET_SECONDS", 0)
    for name in NAMES:
        monkeypatch.setenv(name, "")  # and so taken back when a test sets it
        monkeypatch.delenv(name)
    monkeypatch.setattr(main, "QUIET_SECONDS", 0)  # for which processes after the first hold their mistakes


def told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert run(argv) == 2
    return capsys.readouterr().err.splitlines()


def test_the_command_begins_at_the_first_free_word() -> None:
    own = ["launch", "--ssh_user", "swift", "--check_only", "--ips", "a,b"]
    assert launch.split_command([*own, *SFT, "--output_dir", "swift"]) == (
        own,
        [*SFT, "--output_dir", "swift"],
    )
    assert launch.split_command(["launch", "--ips=a", "megatron", "sft"]) == (
        ["launch", "--ips=a"],
        ["megatron", "sft"],
    )
    assert launch.split_command(["launch", "--help"]) == (["launch", "--help"], [])


@pytest.mark.parametrize("typed", [["--ssh_password", "se cret"], ["--ssh-password=se cret"]])
def test_a_password_leaves_the_arguments(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[list[str]] = []
    monkeypatch.setattr(launch.os, "execv", lambda path, argv: replaced.append([path, *argv]))
    launch.split_command(["launch", *typed, "--ips", "a,b", *SFT])
    assert replaced == [[sys.executable, sys.executable, "-m", "swift", "launch", "--ips", "a,b", *SFT]]
    assert env.read("SSHPASS") == "se cret"
    words = command_for(LaunchRun(ips=("192.0.2.1",)), "192.0.2.1", "python3")
    assert words[0] == "ssh" and "NumberOfPasswordPrompts=1" in words and "BatchMode=yes" not in words
    assert not any("se cret" in word for word in words)
    assert "se cret" not in (Path(ask_pass_folder().name) / "ask").read_text()


def test_a_password_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.getpass, "getpass", lambda prompt: "typed")
    assert launch.split_command(["launch", "--ssh_password", "--ips", "a,b", *SFT])[0] == [
        "launch", "--ips", "a,b",
    ]  # fmt: skip
    assert env.read("SSHPASS") == "typed"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ips", "a,b"], "swift launch needs a command to run on the nodes"),
        (["--ips", "a,b", "--hostfile", "x", *SFT], "--ips and --hostfile both name the nodes"),
        (["--ips", "a,b,a", *SFT], "node a is named twice"),
        (["--ips", "127.0.0.1,10.0.0.8", *SFT], "127.0.0.1 means another machine on every node: they could"),
        (["--ips", "a", "--env", "B", *SFT], "--env expects NAME=VALUE, got 'B'"),
        (["--ips", "a", "--port", "80", *SFT], "--port must be from 1024 to 65535, got 80"),
        (
            ["--hostfile", "nowhere.txt", *SFT],
            "--hostfile nowhere.txt cannot be read: No such file or directory",
        ),
        ([*SFT], "swift launch is not told which nodes there are"),
        (
            ["--ips", "a,b", "swift", "sft", "--lerning_rate", "1"],
            "unknown flag --lerning_rate; did you mean",
        ),
        (["--ips", "a,b", "swift", "stf"], "swift has no command 'stf'"),
        (["--ips", "a,b", "swift", "sft", "--model", "m"], "--dataset is missing"),
    ],
)
def test_mistakes_are_told_before_any_node_is_asked(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "open_links", lambda *_: pytest.fail("connected"))
    assert told(["launch", *flags], capsys)[0].startswith(f"error: {said}")


def test_host_files(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\n10.0.0.1 slots=8\n\n10.0.0.2   # no slots\n")
    assert LaunchRun(hostfile=str(path)).hosts == [("10.0.0.1", 8), ("10.0.0.2", None)]
    path.write_text("a slots=8\nb max=9\n")
    with pytest.raises(
        ValueError, match=r"hosts, line 2: expected `address` or `address slots=8`, got 'b max=9'"
    ):
        _ = LaunchRun(hostfile=str(path)).hosts
    assert LaunchRun(ips=("a, b", "c,")).hosts == [("a", None), ("b", None), ("c", None)]


def test_nodes_of_slurm() -> None:
    assert list(expand_nodes("gpu[08-10,12],login,c[1-2]n[3-4]")) == [
        "gpu08", "gpu09", "gpu10", "gpu12", "login", "c1n3", "c1n4", "c2n3", "c2n4",
    ]  # fmt: skip


def test_a_job_of_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[08-09]")
    monkeypatch.setenv("SLURM_NNODES", "2")
    lines = told(["launch", *SFT], capsys)
    assert lines[0].endswith("has 2 nodes, and swift launch was started on the first of them alone")
    assert lines[1] == "hint: srun --ntasks-per-node=1 swift launch ..."
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    assert told(["launch", *SFT], capsys)[0].startswith("error: srun started 16 tasks on 2 node(s)")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    seen: list[Any] = []
    monkeypatch.setattr(launch.main, "run", lambda argv, program: seen.append((program, argv)) or 7)
    assert run(["launch", "--port", "31000", *SFT]) == 7
    assert seen == [("swift", SFT[1:])]
    assert {name: env.read(name) for name in NAMES[:5]} == {
        "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "gpu08", "MASTER_PORT": "31000",
        "NPROC_PER_NODE": "4",
    }  # fmt: skip


def test_a_job_of_an_operator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert told(["launch", *SFT], capsys)[0].endswith("but MASTER_ADDR is not: where is node 0?")
    monkeypatch.setenv("MASTER_ADDR", "job-master-0")
    assert find_place() == Place("WORLD_SIZE and RANK", 4, 3, "job-master-0")
    for name, value in (("PET_NNODES", "2"), ("PET_NODE_RANK", "0"), ("PET_NPROC_PER_NODE", "2")):
        monkeypatch.setenv(name, value)  # newer operators: WORLD_SIZE counts processes
    assert find_place() == Place("WORLD_SIZE and RANK", 2, 0, "job-master-0", "2")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
            "MASTER_ADDR=127.0.0.1, with NNODES=2: every",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1"},
            "MASTER_ADDR is not set, which means 127.0.0.1, with NNODES=2: every node",
        ),
        ({"NNODES": "2", "MASTER_ADDR": "192.0.2.1"}, "NODE_RANK is not set, with NNODES=2"),
        ({"NNODES": "2", "MASTER_ADDR": "192.0.2.1", "NODE_RANK": "2"}, "NODE_RANK is 2, with NNODES=2"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1, but NNODES is not above 1: this node would train alone"),
        (
            {"WORLD_SIZE": "2", "RANK": "1"},
            "WORLD_SIZE=2 is set, but NNODES is not: this node would train alone",
        ),
        (
            {"MASTER_ADDR": "192.0.2.1"},
            "MASTER_ADDR=192.0.2.1 is another machine, but NNODES is not set: this node",
        ),
    ],
)
def test_nodes_that_would_train_alone(
    variables: dict[str, str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    lines = told(SFT[1:], capsys)
    assert lines[0].startswith(f"error: {said}") and lines[1].startswith("hint: ")


class Quiet(Link):
    """A node that gives fixed answers."""

    def __init__(self, host: str, clock: float = 0.0, **answers: Any) -> None:
        self.host, self.clock, self.fixed = host, clock, answers

    def ask(self, do: str, *, seconds: float = 30.0, **arguments: Any) -> Any:
        return self.fixed[do]


def test_machines_that_do_not_match() -> None:
    def node(host: str, kind: str, free: int, clock: float) -> Quiet:
        return Quiet(host, clock, machine={"gpus": [[kind, 80000, free]] * 4, "memory": 512 << 30})

    links = [node("a", "H100", 79000, 0.2), node("b", "H100", 40000, 0.0), node("c", "A100", 79000, 90.0)]
    report = Report([link.host for link in links])
    plan = Plan({}, ".", "mark", 29500, {"a": None, "b": 8, "c": 4})
    _check_machine(links, plan, report)
    _check_clock(links, report)
    assert report.processes == {"a": 4, "b": 8, "c": 4} and report.shown["b", "gpus"] == "4 H100"
    assert [(f.host, f.check, f.text, f.fatal) for f in report.findings] == [
        ("b", "gpus", "8 processes, but 4 GPU(s)", True),
        ("b", "memory", "in use already: GPU 0: 39 GiB, GPU 1: 39 GiB, GPU 2: 39 GiB, GPU 3: 39 GiB", False),
        ("c", "gpus", "A100, but H100 on a", True),
        ("c", "clock", "90 s ahead of the others", True),
    ]


def test_the_first_error_is_the_one_that_others_followed_from(tmp_path: Path) -> None:
    a, b = Quiet("10.0.0.1"), Quiet("10.0.0.2")
    output = Output(tmp_path / "logs")
    lost = [
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in f',
        "RuntimeError: Connection closed by peer",
    ]
    for line in lost:
        output.take(a, f"[rank0] [rank0]: {line}")
    assert output.first_error() == Trouble(0, f"10.0.0.1 rank 0: {lost[-1]}", tuple(lost[:-1]))
    for line in [*lost[:2], "ValueError: a bad row", "and what follows"]:
        output.take(b, f"[rank3] {line}")
    assert output.first_error() == Trouble(3, "10.0.0.2 rank 3: ValueError: a bad row", tuple(lost[:2]))
    output.clear()
    for line in ("error: no such file", "hint: look again"):
        output.take(b, line)
    assert output.first_error() == Trouble(None, "10.0.0.2: no such file (look again)")
    output.clear()
    for line in lost:
        output.take(a, f"[rank0] {line}")
    output.take(b, "process 3 ended with exit code -9; the others were stopped")
    assert output.first_error() == Trouble(3, "10.0.0.2 rank 3: ended by SIGKILL (out of memory?)")
    assert (tmp_path / "logs" / "rank-3.log").read_text().splitlines()[-2] == "ValueError: a bad row"
    assert "[10.0.0.2 rank 3] ValueError: a bad row" in (tmp_path / "logs" / "all.log").read_text()
    assert "[rank 3] ValueError: a bad row" in (tmp_path / "logs" / "10.0.0.2.log").read_text()


def test_the_table_says_where_and_how_to_mend() -> None:
    report = Report(["10.0.0.1", "10.0.0.2"])
    report.shown = {("10.0.0.1", "ssh"): "ok", ("10.0.0.1", "python"): "3.11.2"}
    report.take({Quiet("10.0.0.2"): LinkError("no way", "build one")}, "ssh")
    assert report.failed == [Finding("10.0.0.2", "ssh", "no way", "build one")]
    lines = report.lines()
    assert lines[0].split()[:3] == ["node", "ssh", "python"]
    assert lines[1].split()[:4] == ["10.0.0.1", "ok", "3.11.2", "-"]
    assert lines[2].split()[:3] == ["10.0.0.2", "FAILED", "-"]
    assert lines[3:] == ["10.0.0.2: ssh: no way", "    build one"]


def test_a_node_on_this_machine_is_asked_without_ssh(tmp_path: Path) -> None:
    """The node's program for real: it hashes, tells who can be reached, runs, and ends what it started."""
    command = command_for(LaunchRun(), "127.0.0.1", sys.executable)
    assert command[0] == sys.executable
    events: Queue[Any] = Queue()
    link = Link("127.0.0.1", 0, command, events)
    link.ask("settle", variables={"HELLO": "you"}, workdir=str(tmp_path), mark="here")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    digests = link.ask("digest", paths=["rows.jsonl", "model", "nothing"])
    (tmp_path / "model" / "config.json").write_text("[]")
    assert digests[2] is None and link.ask("digest", paths=["model"])[0] not in (None, digests[1])
    port = link.ask("listen", port=0)
    link.ask("hush")
    assert link.ask("connect", targets=[["127.0.0.1", port]], patience=1.0)[0].endswith("Connection refused")
    with pytest.raises(LinkError, match="AttributeError"):
        link.ask("nonsense")
    (tmp_path / "output" / "v0-x" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "output" / "v0-x" / "checkpoint-4" / "manifest.json").touch()
    (tmp_path / "output" / "v0-x" / "checkpoint-6").mkdir()
    whole = str(tmp_path / "output" / "v0-x" / "checkpoint-4")
    assert link.ask("checkpoint", root="output", since=0) == whole
    assert link.ask("checkpoint", root="output", since=2e10) is None
    child = "import os, subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); "
    link.ask(
        "start", words=["-c", child + "print(os.environ['HELLO'], flush=True); time.sleep(60)"], variables={}
    )
    assert events.get(timeout=20) == (link, "line", "you")
    mark = b"SWIFT_LAUNCH=here"

    def marked() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                found += [path.parent.name] if mark in path.read_bytes() else []
            except OSError:
                continue
        return found

    deadline = time.monotonic() + 10  # a process that is being made has no environment yet
    while len(marked()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(marked()) == 2
    close_all([link])
    assert marked() == []


STANDS = """
import time
from swift.utils.beat import beat, rest
beat("step 1: rows")
rest()
beat("step 2: rows")
print("ready", flush=True)
def stand_still():
    time.sleep(60)
stand_still()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_that_stands_still(stopped: bool, tmp_path: Path) -> None:
    """The node tells which one, in what, and its stacks; the launcher makes a failure of it and ends all."""
    events: Queue[Any] = Queue()
    link = Link("127.0.0.1", 0, command_for(LaunchRun(), "127.0.0.1", sys.executable), events)
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "RANK": "3"}
    link.ask("settle", variables={}, workdir=str(tmp_path), mark=f"stands-{os.getpid()}")
    link.ask("start", words=["-c", STANDS], variables=variables, patience=1.0)
    assert events.get(timeout=20) == (link, "line", "ready")
    if stopped:
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"SWIFT_LAUNCH=stands-{os.getpid()}".encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGSTOP)
    began = time.monotonic()
    output = Output(tmp_path / "logs")
    failure = Watch([link], events, output).follow()
    close_all([link])
    assert failure and failure.may_pass and time.monotonic() - began < 30
    assert re.fullmatch(
        r"127.0.0.1 rank 3: no progress for \d s in step 2: rows"
        + (r" \(the process is stopped\)" if stopped else ""),
        failure.text,
    )
    assert any("in stand_still" in line for line in failure.lines) != stopped
    logs = "".join(path.read_text() for path in (tmp_path / "logs").glob("all.log"))
    assert ("[127.0.0.1 rank 3]" in logs and "in stand_still" in logs) != stopped
