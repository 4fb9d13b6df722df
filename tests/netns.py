"""Machines for tests: network namespaces on one link, each with an sshd of its own.

They share this machine's files and processors. Made by root alone; `missing()` says what is not there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SSHD = "/usr/sbin/sshd"
OWN = f"sw{os.getpid()}"  # two runs of the tests on one machine do not meet
BRIDGE = "swb"
WAIT = """
import socket, sys, time
for _ in range(100):
    try:
        sys.exit(socket.create_connection((sys.argv[1], 22)).close())
    except OSError:
        time.sleep(0.05)
"""


def call(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=check, capture_output=True, text=True)


def missing() -> str | None:
    """Why there can be no such machines here, None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "ssh", "ssh-keygen", SSHD):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    probe = call("ip", "netns", "add", OWN, check=False)
    if probe.returncode != 0:
        return f"no network namespaces: {probe.stderr.strip()}"
    link = call("ip", "link", "add", "probe", "netns", OWN, "type", "veth", check=False)
    call("ip", "netns", "del", OWN, check=False)
    return None if link.returncode == 0 else f"no veth links: {link.stderr.strip()}"


def words_of(pid: int) -> str:
    """Its arguments, nothing when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
    except OSError:
        return ""


@dataclass
class Machine:
    """One namespace; what ran in it is found by `processes`."""

    name: str
    address: str
    sshd: "subprocess.Popen[bytes] | None" = None

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return call("ip", "netns", "exec", self.name, *words, check=check)

    def processes(self) -> list[int]:
        """What runs there beside sshd, which may keep a process for a connection that is dead."""
        found = [int(pid) for pid in call("ip", "netns", "pids", self.name).stdout.split()]
        return [pid for pid in found if not words_of(pid).startswith("sshd:") and words_of(pid)]


@dataclass
class Network:
    """The machines, the launching one first, and the settings of ssh with keys for them."""

    folder: Path
    count: int = 2
    machines: list[Machine] = field(default_factory=list)

    def __enter__(self) -> "Network":
        call("ip", "netns", "add", OWN)
        inside = ("ip", "netns", "exec", OWN)
        call(*inside, "ip", "link", "add", BRIDGE, "type", "bridge")
        call(*inside, "ip", "link", "set", BRIDGE, "up")
        for kind in ("host", "user", "stranger"):
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / kind))
        for i in range(self.count + 1):
            machine = Machine(f"{OWN}-{i}", f"10.77.0.{i + 1}")
            call("ip", "netns", "add", machine.name)
            call(
                "ip", "link", "add", "eth0", "netns", machine.name,
                "type", "veth", "peer", "name", f"port{i}", "netns", OWN,
            )  # fmt: skip
            call(*inside, "ip", "link", "set", f"port{i}", "master", BRIDGE, "up")
            machine.run("ip", "link", "set", "lo", "up")
            machine.run("ip", "link", "set", "eth0", "up")
            machine.run("ip", "addr", "add", f"{machine.address}/24", "dev", "eth0")
            self.machines.append(machine)
        for machine in self.machines[1:]:
            self.start_sshd(machine)
        (self.folder / "config").write_text(self.settings("user"))
        (self.folder / "config-stranger").write_text(self.settings("stranger"))
        return self

    def settings(self, key: str) -> str:
        return (
            f"Host *\n  IdentityFile {self.folder / key}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder / 'known'}\n"
        )

    def start_sshd(self, machine: Machine, *lines: str, mounts: Sequence[tuple[Path, Path]] = ()) -> None:
        """Starts it, or again with other settings, and with files of its own: (the file, what it hides)."""
        self.stop_sshd(machine)
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        for path in (self.folder, self.folder / "authorized"):
            path.chmod(0o700)
        config = self.folder / f"{machine.name}.conf"
        text = (
            f"ListenAddress {machine.address}\nHostKey {self.folder / 'host'}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.folder / 'authorized'}\nStrictModes no\nPermitRootLogin yes\n"
        )
        config.write_text(text + "".join(f"{line}\n" for line in lines))
        Path("/run/sshd").mkdir(exist_ok=True)
        # `ip netns exec` has made a mount namespace, so nobody else sees these.
        hide = "".join(f"mount --bind {file} {place}; " for file, place in mounts)
        machine.sshd = subprocess.Popen(
            ["ip", "netns", "exec", machine.name, "sh", "-ec", f"{hide}exec {SSHD} -D -e -f {config}"],
            stderr=(self.folder / f"{machine.name}.log").open("ab"),
        )
        machine.run(sys.executable, "-c", WAIT, machine.address)

    def stop_sshd(self, machine: Machine) -> None:
        if machine.sshd:
            machine.sshd.kill()
            machine.sshd.wait()
            machine.sshd = None

    def clear(self) -> None:
        """Ends what runs on the machines, and removes them."""
        for machine in self.machines:
            self.stop_sshd(machine)
            for pid in call("ip", "netns", "pids", machine.name).stdout.split():
                call("kill", "-9", pid, check=False)
        for name in [OWN, *(machine.name for machine in self.machines)]:
            call("ip", "netns", "del", name, check=False)

    def __exit__(self, *_: object) -> None:
        self.clear()
