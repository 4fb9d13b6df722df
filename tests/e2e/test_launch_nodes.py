"""`swift launch` over real ssh between network namespaces: what is found before a start, and how a run ends.

The machines share files, so what should differ between them is given by address: another sshd configuration,
another directory mounted over. Skips itself where there are no namespaces or no sshd.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from netns import Machine, Network, missing, words_of
from workers import Workers

SECRET = "correct-horse"
HASH = "$6$swift$zSfZ6Vrq9X/FNzzGu6jfsqu4UJY.mdUBxNu9DIjzJwYKekGADylzpZZj2bHYqDp9sBRHaNYQQ3.7l1o2dWTSl/"
TAKE = "import socket, sys, time; taken = socket.create_server(('', int(sys.argv[1]))); time.sleep(600)"
SOURCE = Path(__file__).resolve().parents[2] / "src"

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    reason = missing()
    if reason:
        pytest.skip(f"no machines to launch on: {reason}")
    with Network(tmp_path_factory.mktemp("net"), count=3) as network:
        yield network


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [{"query": f"Say {i}.", "response": f"{i}, it is" + " so" * (i % 5)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def start(network: Network, directory: Path, *words: str, **variables: str) -> "subprocess.Popen[str]":
    """`swift launch WORDS` on the first machine, with keys for the others."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NPROC_PER_NODE", "SSHPASS", "PYTHONPATH")
    }
    environment |= {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "SWIFT_OFFLINE": "1", **variables}
    command = [
        "ip",
        "netns",
        "exec",
        network.machines[0].name,
        sys.executable,
        "-m",
        "swift",
        "launch",
        *words,
    ]
    return subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(network: Network, directory: Path, *words: str, **variables: str) -> tuple[int, str]:
    process = start(network, directory, *words, **variables)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def sft(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    return [
        "swift", "sft", "--model", str(model), "--dataset", str(rows), "--train_type", "full",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3",
        "--logging_steps", "1", "--split_dataset_ratio", "0", "--report_to", "none",
        "--lr_scheduler_type", "constant", "--add_version", "false", "--output_dir", str(output), *more,
    ]  # fmt: skip


def on(*machines: Machine) -> list[str]:
    return ["--ips", ",".join(machine.address for machine in machines)]


def keys(network: Network, name: str = "config") -> list[str]:
    return ["--ssh_config", str(network.folder / name)]


def fake_package(folder: Path, name: str, version: str) -> Path:
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    return folder


def test_what_is_wrong_is_found_before_anything_starts(
    network: Network, tiny_qwen3_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """Another version, other rows, a directory that is not shared, a closed port, a node that is down."""
    _, one, two, three = network.machines
    other = fake_package(tmp_path / "other", "peft", "9.9")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "rows.jsonl").write_text(rows.read_text().replace("so", "no", 1))
    output = tmp_path / "shared" / "output"
    output.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    network.start_sshd(
        two,
        f"SetEnv PYTHONPATH={other}",
        mounts=[(hidden / "rows.jsonl", rows), (elsewhere, output.parent)],
    )
    closed = ("to", two.address, "ipproto", "tcp", "dport", "1024-65534", "unreachable")
    one.run("ip", "rule", "add", *closed)
    network.stop_sshd(three)
    words = sft(tiny_qwen3_dir, rows, output)
    code, said = launch(network, tmp_path, *keys(network), *on(one, two, three), *words)
    one.run("ip", "rule", "del", *closed)
    network.start_sshd(two)
    network.start_sshd(three)
    lines = said.splitlines()
    assert code == 2, said
    at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["node", "ssh"])
    table = {line.split()[0]: line.split()[1:] for line in lines[at + 1 : at + 4]}
    assert table[one.address].count("FAILED") == 1 and lines[at].split().index("ports") > 0
    start = f"{one.address}: ports: cannot reach {two.address}:"
    assert any(line.startswith(start) and "unreachable" in line for line in lines), said
    assert table[three.address][0] == "FAILED" and set(table[three.address][1:]) == {"-"}
    assert f"{three.address}: ssh: no sshd on that port" in lines
    assert any(line.startswith(f"{two.address}: packages: peft 9.9 (on {one.address}: ") for line in lines)
    assert f"{two.address}: files: --dataset {rows}: differs from that on {one.address}" in lines
    assert any(
        line.startswith(f"{two.address}: shared: ") and "is another directory" in line for line in lines
    )
    assert (
        lines[-1] == f"error: not ready: {one.address}, {two.address}, {three.address}; nothing was started"
    )
    assert not output.exists() and not list(tmp_path.glob("launch_logs"))


def spies(stop: threading.Event, seen: dict[int, str]) -> None:
    """Every process that has the password in its arguments, as long as `stop` is not set."""
    while not stop.is_set():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = path.read_bytes()
                if SECRET.encode() in words:
                    seen[int(path.parent.name)] = words.decode()


def test_who_may_not_log_in(network: Network, tiny_qwen3_dir: Path, rows: Path, tmp_path: Path) -> None:
    """A wrong key, a wrong password, a port that is taken; the right password is in no list and no file."""
    _, one, two, _ = network.machines
    words = ["--check_only", "--log_dir", "logs", *sft(tiny_qwen3_dir, rows, tmp_path / "output")]
    stranger = keys(network, "config-stranger")
    code, said = launch(network, tmp_path, *stranger, *on(one), *words)
    assert code == 2 and f"{one.address}: ssh: refused: wrong key, password or user" in said, said
    assert "ssh-copy-id" in said
    shadow = tmp_path / "shadow"
    shadow.write_text(f"root:{HASH}:19000:0:99999:7:::\n")
    for machine in (one, two):
        network.start_sshd(machine, "PasswordAuthentication yes", mounts=[(shadow, Path("/etc/shadow"))])
    code, said = launch(network, tmp_path, *stranger, *on(one), *words, SSHPASS="wrong-horse")
    assert code == 2 and f"{one.address}: ssh: refused: wrong key, password or user" in said, said
    # Typed on the command line, for compatibility. A taken port keeps this from summing over the nodes.
    taken = subprocess.Popen(["ip", "netns", "exec", one.name, sys.executable, "-c", TAKE, "29500"])
    stop, seen = threading.Event(), dict[int, str]()
    thread = threading.Thread(target=spies, args=(stop, seen))
    thread.start()
    process = start(network, tmp_path, *stranger, *on(one, two), "--ssh_password", SECRET, *words)
    said, _ = process.communicate(timeout=120)
    stop.set()
    thread.join()
    taken.kill()
    taken.wait()
    for machine in (one, two):
        network.start_sshd(machine)
    assert process.returncode == 2 and f"{one.address}: ports: cannot listen on --port 29500" in said, said
    assert f"not ready: {one.address}; nothing was started" in said and SECRET not in said
    # Until it has replaced itself, the launcher has the arguments that it was started with.
    assert set(seen) <= {process.pid}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def curve(run: Path) -> dict[int, float]:
    lines = (run / "logging.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {int(row["global_step/max_steps"].split("/")[0]): row["loss"] for row in rows if "loss" in row}


def await_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "logging.jsonl").exists() and max(curve(run), default=0) >= step:
            return
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"step {step} was not reached: {process.communicate()[0]}")


def rank_on(machine: Machine) -> int:
    """The process of a rank there."""
    for pid in machine.processes():
        with suppress(OSError):
            if b"LOCAL_RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    raise AssertionError(f"no rank on {machine.name}")


def assert_nothing_runs(*machines: Machine) -> None:
    """No process but sshd's own is left, within seconds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(machine.processes() for machine in machines):
        time.sleep(0.2)
    assert [words_of(pid) for machine in machines for pid in machine.processes()] == []


def single(workers: Workers, words: list[str], output: Path) -> dict[int, float]:
    """The same run on one host."""
    at = words.index("--output_dir")
    result = workers.run([*words[1:at], "--output_dir", str(output), *words[at + 2 :]], 2)
    assert result.code == 0, result.stderr[-3000:]
    return curve(output)


def test_two_machines_train_as_one(
    network: Network, workers: Workers, tiny_qwen3_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """A rank is killed, all go on from the last checkpoint; Ctrl-C ends it; losses are those of one host."""
    _, one, two, _ = network.machines
    output = tmp_path / "output"
    steps = 400
    words = sft(tiny_qwen3_dir, rows, output, "--max_steps", str(steps), "--save_steps", "10")
    process = start(
        network, tmp_path, *keys(network), *on(one, two), "--max_restarts", "1", "--log_dir", "logs", *words
    )
    await_step(output, 12, process)
    os.kill(rank_on(two), signal.SIGKILL)
    while_running = time.monotonic()
    before = max(curve(output))
    await_step(output, before + 30, process)
    assert time.monotonic() - while_running < 200
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"error: {two.address} rank 1: ended by SIGKILL (out of memory?)" in said
    assert "starting again on 2 node(s) from " in said and "/checkpoint-" in said
    assert_nothing_runs(one, two)
    ours = curve(output)
    theirs = single(workers, [*words, "--max_steps", str(len(ours))], tmp_path / "single")
    shared = sorted(ours)[:-1]
    assert shared == list(range(1, len(shared) + 1))
    assert [ours[step] for step in shared] == pytest.approx([theirs[step] for step in shared], rel=1e-6)
    logs = {path.name for path in (tmp_path / "logs").iterdir()}
    assert logs == {"all.log", f"{one.address}.log", f"{two.address}.log", "rank-0.log", "rank-1.log"}
    assert "step " in (tmp_path / "logs" / "rank-0.log").read_text()


@pytest.mark.slow_suite
def test_a_machine_that_is_cut_off(
    network: Network, workers: Workers, tiny_qwen3_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """The link goes down mid-step: both sides end by themselves, and the node that is left goes on."""
    _, one, two, _ = network.machines
    output = tmp_path / "output"
    words = sft(tiny_qwen3_dir, rows, output, "--max_steps", "60", "--save_steps", "5")
    process = start(
        network, tmp_path, *keys(network), *on(one, two), "--max_restarts", "1", "--log_dir", "logs", *words
    )
    await_step(output, 7, process)
    two.run("ip", "link", "set", "eth0", "down")
    try:
        assert_nothing_runs(two)
        said, _ = process.communicate(timeout=280)
    finally:
        two.run("ip", "link", "set", "eth0", "up")
    assert process.returncode == 0, said
    assert f"error: {two.address}: no word for 12 s: the machine or the network to it is down" in said, said
    assert f"warning: {two.address}: " in said and "starting again on 1 node(s) from " in said
    assert_nothing_runs(one)
    theirs = single(workers, words, tmp_path / "single")
    ours = curve(output)
    assert list(ours) == list(range(1, 61))
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5)


@pytest.mark.slow_suite
def test_a_rank_that_is_stopped(network: Network, tiny_qwen3_dir: Path, rows: Path, tmp_path: Path) -> None:
    """SIGSTOP: both nodes live, and no collective would fail for half an hour. It is told who it was."""
    _, one, two, _ = network.machines
    words = sft(tiny_qwen3_dir, rows, tmp_path / "output", "--max_steps", "4000")
    process = start(
        network, tmp_path, *keys(network), *on(one, two), "--hang_timeout", "10", "--log_dir", "logs", *words
    )
    await_step(tmp_path / "output", 3, process)
    os.kill(rank_on(two), signal.SIGSTOP)
    began = time.monotonic()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and time.monotonic() - began < 10 + 30, said
    stood = r"no progress for \d+ s in step \d+: [a-z ]+ \(the process is stopped\)"
    assert re.search(f"error: {two.address} rank 1: {stood}", said), said
    assert_nothing_runs(one, two)
    assert "in _train_step" in (tmp_path / "logs" / "rank-0.log").read_text()  # which waited for it


@pytest.mark.slow_suite
def test_a_launcher_that_is_killed_leaves_nothing(
    network: Network, tiny_qwen3_dir: Path, rows: Path, tmp_path: Path
) -> None:
    _, one, two, _ = network.machines
    words = sft(tiny_qwen3_dir, rows, tmp_path / "output", "--max_steps", "4000")
    process = start(network, tmp_path, *keys(network), *on(one, two), *words)
    await_step(tmp_path / "output", 3, process)
    process.kill()
    process.wait()
    assert_nothing_runs(one, two)


@pytest.mark.slow_suite
def test_the_agent_recipe_from_two_machines_to_an_answer(
    network: Network, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    """The wrapper of Qwen3-32B with a tiny model spread over both; its checkpoint is exported and asked."""
    _, one, two, _ = network.machines
    tools = json.dumps([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}])
    messages = [
        {"role": "user", "content": "What is 7 + 5?"},
        {"role": "tool_call", "content": json.dumps({"name": "add", "arguments": {"a": 7, "b": 5}})},
        {"role": "tool_response", "content": "12"},
        {"role": "assistant", "content": "7 + 5 = 12."},
    ]
    rows = [{"tools": tools, "messages": messages}] * 16
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "ssh"  # the recipe has no flag for another ssh configuration
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {network.folder / "config"} "$@"\n')
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    environment |= {"MODEL": str(tiny_qwen3_dir), "SWIFT_OFFLINE": "1"}

    def call(*words: str, **more: str) -> str:
        inside = ["ip", "netns", "exec", network.machines[0].name, *words]
        done = subprocess.run(
            inside,
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
            input="exit\n",
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    recipes = SOURCE.parent / "recipes"
    call(
        "bash", str(recipes / "Qwen3_32B_agent_sft.sh"), *on(one, two), "--save", "out",
        "--dataset", "rows.jsonl", "--micro_bs", "1", "--global_bs", "4", "--tensor_model_parallel_size", "2",
        "--context_parallel_size", "1", "--max_length", "512", "--epochs", "1", "--save_interval", "2",
        "--add_version", "false",
    )  # fmt: skip
    small = ("--torch_dtype", "float32")
    call("bash", str(recipes / "tools/export_megatron_2_hf_model.sh"), *small, MCORE_MODEL="out", OUTPUT="hf")
    infer = (sys.executable, "-m", "swift", "infer", "--model", "hf", "--val_dataset", "rows.jsonl#2")
    call(*infer, "--max_new_tokens", "4", "--result_path", "answers.jsonl")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
