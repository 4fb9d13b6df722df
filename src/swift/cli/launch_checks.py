"""What is looked at on all nodes before a launch starts anything, and the table of what was found.

Owns: which answers are wrong, where, and how that is mended. How a node finds one is in launch_node.py.
"""

import secrets
import statistics
from dataclasses import dataclass, field
from typing import Any

from swift.cli.launch_link import Link, LinkError, ask_all
from swift.utils.files import format_bytes

CHECKS = ("ssh", "python", "packages", "gpus", "memory", "clock", "ports", "shared", "files", "all-reduce")
MEND = {  # where a finding does not say so itself
    "python": "install the same one, or name it with --python",
    "packages": "install the same versions, for example the same image",
    "gpus": "name nodes with GPUs of one kind; --nproc_per_node and slots=N in a host file say how many",
    "memory": "nvidia-smi shows who has it",
    "clock": "set it, and keep it set with chrony or ntp",
    "ports": "let the nodes reach each other on all ports above 1023 (firewall, security group)",
    "shared": "name a directory on storage that all nodes mount, with --output_dir or --save",
    "files": "copy one of them to all nodes, or name one on storage that all nodes mount",
    "all-reduce": "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface to use",
}
PACKAGES = (
    "swiftune", "torch", "transformers", "peft", "megatron-core", "numpy", "safetensors", "tokenizers",
    "transformer-engine", "flash-attn", "deepspeed", "bitsandbytes", "vllm", "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)  # fmt: skip
CLOCK_SECONDS = 30.0
FREE_SHARE = 0.9  # of a GPU's memory; more in use is somebody else's
FREE_BYTES = 4 << 30
DIGEST_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command to be run needs of the nodes."""

    variables: dict[str, str]
    workdir: str
    mark: str
    port: int
    processes: dict[str, int | None]  # by node, None = one for each GPU
    shared: str | None = None  # directory that all nodes write to; None = none
    files: dict[str, str] = field(default_factory=dict)  # flag and value, by path


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong, or only worth knowing, on one node."""

    host: str
    check: str
    text: str
    mend: str = ""
    fatal: bool = True


@dataclass(slots=True)
class Report:
    """What was found. `shown`: facts for the table by (node, check); the others by node."""

    hosts: list[str]
    findings: list[Finding] = field(default_factory=list)
    shown: dict[tuple[str, str], str] = field(default_factory=dict)
    processes: dict[str, int] = field(default_factory=dict)
    interfaces: dict[str, str] = field(default_factory=dict)

    def add(self, link: Link, check: str, text: str, mend: str = "", *, fatal: bool = True) -> None:
        self.findings.append(Finding(link.host, check, text, mend or MEND.get(check, ""), fatal))

    def compare(self, values: dict[Link, Any], check: str) -> None:
        """A finding for each node whose value is another one than that of the first."""
        first, *others = values
        for link in others:
            if values[link] != values[first]:
                self.add(link, check, f"{values[link]}, but {values[first]} on {first.host}")

    def take(self, answers: dict[Link, Any], check: str) -> dict[Link, Any]:
        """The answers that are none of an error; the others become findings."""
        for link, answer in answers.items():
            if isinstance(answer, LinkError):
                self.add(link, check, answer.message, answer.mend)
            else:
                self.shown.setdefault((link.host, check), "ok")
        return {link: answer for link, answer in answers.items() if not isinstance(answer, LinkError)}

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.fatal]

    def lines(self) -> list[str]:
        """The table, and a line for each finding."""
        rows = [("node", *CHECKS)]
        for host in self.hosts:
            states = {f.check: "FAILED" if f.fatal else "look" for f in self.findings if f.host == host}
            cells = (states.get(check) or self.shown.get((host, check), "-") for check in CHECKS)
            rows.append((host, *cells))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        for finding in sorted(self.findings, key=lambda f: not f.fatal):
            lines.append(f"{finding.host}: {finding.check}: {finding.text}")
            lines += [f"    {finding.mend}"] if finding.mend else []
        return lines


def settle(links: list[Link], plan: Plan) -> Report:
    """Connects: every node takes its environment and directory. The part that comes before any start."""
    report = Report([link.host for link in links])
    answers = ask_all(
        links,
        "settle",
        seconds=25.0,
        variables=plan.variables,
        workdir=plan.workdir,
        mark=lambda link: f"{plan.mark}-{link.host}",
    )
    for answer in answers.values():
        if isinstance(answer, LinkError) and "FileNotFoundError" in answer.message:
            answer.message = f"the directory {plan.workdir} is not there"
            answer.mend = "mount it there too, or name another one with --workdir"
    for link, answer in report.take(answers, "ssh").items():
        report.shown[link.host, "python"] = answer
    return report


def check_nodes(links: list[Link], plan: Plan, report: Report) -> None:
    """Everything after `settle`, on the nodes that it reached; adds to the report."""
    reached = {finding.host for finding in report.failed}
    links = [link for link in links if link.host not in reached]
    if not links:
        return
    versions = {link: report.shown[link.host, "python"].rpartition(".")[0] for link in links}
    report.compare(versions, "python")
    _check_packages(links, report)
    _check_machine(links, plan, report)
    _check_clock(links, report)
    _check_ports(links, plan, report)
    if plan.shared:
        _check_shared(links, plan.shared, report)
    if plan.files:
        _check_files(links, plan.files, report)
    if len(report.hosts) > 1 and not report.failed:
        _check_all_reduce(links, plan, report)


def _check_packages(links: list[Link], report: Report) -> None:
    found = report.take(ask_all(links, "packages", names=PACKAGES), "packages")
    first = next(iter(found), None)
    for link, packages in found.items():
        wrong = [
            f"{name} {version or 'missing'} (on {first.host}: {found[first][name] or 'none'})"
            for name, version in packages.items()
            if first and version != found[first][name]
        ]
        if packages["swift"] is None:
            report.add(link, "packages", "swift is not installed for this Python")
        elif wrong:
            report.add(link, "packages", ", ".join(wrong))


def _check_machine(links: list[Link], plan: Plan, report: Report) -> None:
    found = report.take(ask_all(links, "machine"), "gpus")
    names = {link: sorted({name for name, _, _ in facts["gpus"]}) for link, facts in found.items()}
    kinds = {link: ", ".join(names[link]) or "no GPU" for link in found}
    for link, facts in found.items():
        gpus, wanted = facts["gpus"], plan.processes[link.host]
        report.processes[link.host] = wanted or len(gpus) or 1
        report.shown[link.host, "gpus"] = f"{len(gpus)} {kinds[link]}" if gpus else "none"
        report.shown[link.host, "memory"] = format_bytes(facts["memory"])
        if gpus and (wanted or 0) > len(gpus):
            report.add(link, "gpus", f"{wanted} processes, but {len(gpus)} GPU(s)")
        busy = [i for i, (_, total, free) in enumerate(gpus) if free < FREE_SHARE * total]
        if busy:
            used = ", ".join(f"GPU {i}: {(gpus[i][1] - gpus[i][2]) / 1024:.0f} GiB" for i in busy)
            report.add(link, "memory", f"in use already: {used}", fatal=False)
        if facts["memory"] < FREE_BYTES:
            report.add(link, "memory", f"{format_bytes(facts['memory'])} of memory free", fatal=False)
    report.compare(kinds, "gpus")
    if all(plan.processes[link.host] is None for link in found):
        counts = {link: f"{len(facts['gpus'])} GPU(s)" for link, facts in found.items()}
        report.compare(counts, "gpus")


def _check_clock(links: list[Link], report: Report) -> None:
    middle = statistics.median(link.clock for link in links)
    for link in links:
        ahead = link.clock - middle
        report.shown[link.host, "clock"] = "ok"
        if abs(ahead) > CLOCK_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            report.add(link, "clock", f"{abs(ahead):.0f} s {way} the others")


def _check_ports(links: list[Link], plan: Plan, report: Report) -> None:
    """Node 0 can listen on the port, and each node reaches each other on a port that anyone may take."""
    head = links[0]
    opened = report.take(ask_all(links, "listen", port=0), "ports")
    targets = [[link.host, port] for link, port in opened.items()]
    if head.index == 0:
        try:
            head.ask("listen", port=plan.port)
            targets.append([head.host, plan.port])
        except LinkError as error:
            said = f"cannot listen on --port {plan.port}: {error.message}"
            report.add(head, "ports", said, "name another --port")
    reached = report.take(ask_all(list(opened), "connect", targets=targets, patience=5.0), "ports")
    for link, problems in reached.items():
        closed = [
            f"{host}:{port} ({problem})"
            for (host, port), problem in zip(targets, problems, strict=True)
            if problem and host != link.host
        ]
        if closed:
            ends = "" if len(closed) < 4 else f" and {len(closed) - 3} more"
            report.add(link, "ports", f"cannot reach {', '.join(closed[:3])}{ends}")
    ask_all(list(opened), "hush")
    names = ask_all(list(opened), "interface", target=lambda link: _other(link, links))
    report.interfaces = {link.host: name for link, name in names.items() if isinstance(name, str)}


def _other(link: Link, links: list[Link]) -> str:
    return next((other.host for other in links if other is not link), link.host)


def _check_shared(links: list[Link], folder: str, report: Report) -> None:
    name = f".swift-launch-{secrets.token_hex(4)}"
    head, *others = links
    written = report.take(ask_all([head], "token", folder=folder, name=name, write="write"), "shared")
    if not written:
        return
    place = written[head][0]
    found = report.take(ask_all(others, "token", folder=folder, name=name, write="look"), "shared")
    ask_all([head], "token", folder=folder, name=name, write="remove")
    for link, (where, seen) in found.items():
        if not seen:
            how = f"is another directory than on {head.host}" if where == place else "is not there"
            report.add(link, "shared", f"{place}, where checkpoints go, {how}")


def _check_files(links: list[Link], files: dict[str, str], report: Report) -> None:
    paths = list(files)
    found = report.take(ask_all(links, "digest", seconds=DIGEST_SECONDS, paths=paths), "files")
    for i, path in enumerate(paths):
        hashes = {link: digests[i] for link, digests in found.items()}
        holder = next((link for link, digest in hashes.items() if digest), None)
        if holder is None:
            if path.startswith(("/", "./", "../", "~")):
                report.add(links[0], "files", f"{files[path]}: not there, on no node")
            continue  # else the name of something on a hub
        for link, digest in hashes.items():
            if digest is None:
                report.add(link, "files", f"{files[path]}: not there, but on {holder.host}")
            elif digest != hashes[holder]:
                report.add(link, "files", f"{files[path]}: differs from that on {holder.host}")


def _check_all_reduce(links: list[Link], plan: Plan, report: Report) -> None:
    words = ["-m", "swift.engines.reduction"]

    def variables(link: Link) -> dict[str, str]:
        own = node_variables(link, links, plan.port, dict.fromkeys(report.hosts, 1), report.interfaces)
        return {**own, "RANK": str(link.index), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(links))}

    answers = ask_all(links, "run", seconds=150.0, words=words, variables=variables, limit=120.0)
    for link, (code, output) in report.take(answers, "all-reduce").items():
        if code != 0:
            last = (output.strip().splitlines() or [f"exit code {code}"])[-1]
            report.add(link, "all-reduce", last[:300])


def node_variables(
    link: Link, links: list[Link], port: int, processes: dict[str, int], interfaces: dict[str, str]
) -> dict[str, str]:
    """What torchrun is told on one of the nodes `links`."""
    own = {
        "NNODES": str(len(links)),
        "NODE_RANK": str(links.index(link)),
        "MASTER_ADDR": links[0].host,
        "MASTER_PORT": str(port),
        "NPROC_PER_NODE": str(processes[link.host]),
    }
    if link.host in interfaces:
        own["GLOO_SOCKET_IFNAME"] = interfaces[link.host]  # else gloo takes what the host's name stands for
    return own
