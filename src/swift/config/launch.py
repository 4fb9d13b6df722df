"""`swift launch`: the nodes that a command runs on, and how they are reached."""

from dataclasses import dataclass
from pathlib import Path

from swift.config.option import Clash, ConfigError, option

LOOPBACK = ("localhost", "127.", "::1", "0.0.0.0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRun:
    """Nodes and the way to them; the command that follows has flags of its own."""

    ips: tuple[str, ...] = option((), "addresses or names of the nodes, with commas; the first is node 0")
    hostfile: str | None = option(None, "file with a node a line: `address` or `address slots=8` (processes)")
    ssh_user: str | None = option(None, "who to log in as; none = as ssh does by itself")
    ssh_port: int | None = option(None, "port of sshd; none = as ssh does by itself", range=(1, 65535))
    ssh_config: str | None = option(None, "file of settings for ssh (ssh -F), such as keys and names")
    ssh_password: str | None = option(
        None, "password for nodes without keys; without a value it is asked for. SSHPASS=... is better"
    )
    env: tuple[str, ...] = option((), "NAME=VALUE for the processes of every node; one or several")
    workdir: str | None = option(None, "directory to run in on every node; none = this one")
    python: str | None = option(None, "interpreter on every node; none = the path of this one")
    port: int = option(29500, "port of node 0 where the processes meet", range=(1024, 65535))
    nproc_per_node: int | None = option(None, "processes a node; none = NPROC_PER_NODE, or one a GPU", min=1)
    check_only: bool = option(False, "look at the nodes, show what was found, and end")
    max_restarts: int = option(0, "times that a run that failed goes on from its last checkpoint", min=0)
    hang_timeout: float = option(1800, "longest time without a step; 0 = forever", unit="seconds", min=0)
    log_dir: str | None = option(None, "directory of the nodes' output; none = launch_logs/<date>")
    command: tuple[str, ...] = option((), "what to run, such as megatron sft ...; typed, it just follows")

    def check(self) -> None:
        if self.command[:1] not in (("swift",), ("megatron",)) or self.command[1:2] == ("launch",):
            raise ConfigError(
                "swift launch needs a command to run on the nodes",
                hint="put it behind the flags: swift launch --ips 10.0.0.1,10.0.0.2 megatron sft ...",
            )
        if self.ips and self.hostfile:
            raise Clash("--ips and --hostfile both name the nodes")
        for item in self.env:
            if not item.partition("=")[0].isidentifier() or "=" not in item:
                raise ConfigError(f"--env expects NAME=VALUE, got {item!r}")
        hosts = [host for host, _ in self.hosts]
        twice = next((host for host in hosts if hosts.count(host) > 1), None)
        if twice:
            raise ConfigError(f"node {twice} is named twice", hint="name every node once")
        inward = next((host for host in hosts if host.startswith(LOOPBACK)), None)
        if inward and len(hosts) > 1:
            raise ConfigError(
                f"{inward} means another machine on every node: they could not find each other",
                hint="name this machine by the address that the others reach it by",
            )

    @property
    def hosts(self) -> list[tuple[str, int | None]]:
        """Every node with its processes, None = by its GPUs. ConfigError where the host file is wrong."""
        if self.hostfile is None:
            names = [part.strip() for word in self.ips for part in word.split(",")]
            return [(name, None) for name in names if name]
        try:
            lines = Path(self.hostfile).expanduser().read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(
                f"--hostfile {self.hostfile} cannot be read: {error.strerror or error}"
            ) from None
        found: list[tuple[str, int | None]] = []
        for number, line in enumerate(lines, 1):
            name, *rest = line.partition("#")[0].split() or [""]
            slots = rest[0].removeprefix("slots=") if rest else ""
            if len(rest) > 1 or (rest and (slots == rest[0] or not slots.isdecimal() or slots == "0")):
                raise ConfigError(
                    f"--hostfile {self.hostfile}, line {number}: expected `address` or `address slots=8`, "
                    f"got {line.strip()!r}"
                )
            if name:
                found.append((name, int(slots) if slots else None))
        if not found:
            raise ConfigError(f"--hostfile {self.hostfile} names no node")
        return found
