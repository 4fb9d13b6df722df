"""The program that `swift launch` runs on every node: it is sent there, and needs nothing installed.

Owns: answering what the launcher asks about its machine, running the command, and leaving no process behind.
Not here: what the answers should be (launch_checks.py). Standard library and Python 3.8 only, so that an
old interpreter can say which one it is. One JSON object a line both ways; `main` is the entry.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

BEAT_SECONDS = 2.0
DEAF_SECONDS = 15.0  # without a word from the launcher: its machine or the network is gone
WHOLE_BYTES = 256 << 20  # files up to this size are hashed whole
SAMPLE_BYTES = 64 << 10
MARK = "SWIFT_LAUNCH"  # in the environment of every process that belongs to a launch


class Agent:
    """One node's side of a launch."""

    def __init__(self, variables):
        self.variables = variables
        self.out = os.dup(1)
        os.dup2(2, 1)  # what anything else prints must not look like an answer
        self.lock = threading.Lock()
        self.heard = time.monotonic()
        self.child = None
        self.stopping = False
        self.sockets = []
        self.folder = None
        self.patience = 0.0  # seconds that a rank may be without progress, 0 = any

    def send(self, **message):
        data = (json.dumps({"now": time.time(), **message}) + "\n").encode()
        with self.lock:
            while data:
                data = data[os.write(self.out, data) :]

    def serve(self):
        """Answers until the connection closes, each question in a thread of its own."""
        threading.Thread(target=self.beat, daemon=True).start()
        for line in sys.stdin.buffer:
            self.heard = time.monotonic()
            message = json.loads(line)
            if message["do"] != "ping":
                threading.Thread(target=self.answer, args=(message,), daemon=True).start()
        self.leave()

    def beat(self):
        while True:
            time.sleep(BEAT_SECONDS)
            if time.monotonic() - self.heard > DEAF_SECONDS:
                self.leave()
            try:
                hung = self.find_hung()
                self.send(**({"hang": hung} if hung else {}))
            except OSError:
                self.leave()

    def leave(self):
        """Ends every process of this launch, then this one."""
        self.do_stop("SIGTERM", 3.0)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(0)

    def answer(self, message):
        name, number = message.pop("do"), message.pop("id")
        try:
            value = getattr(self, "do_" + name)(**message)
            self.send(id=number, value=value)
        except Exception as error:
            with suppress(OSError):
                self.send(id=number, error=f"{type(error).__name__}: {error}")

    def do_settle(self, variables, workdir, mark):
        """Takes the launch's environment and directory; its version of Python."""
        own = self.variables.get("PYTHONPATH")
        if own and variables.get("PYTHONPATH") not in (None, own):
            variables["PYTHONPATH"] += os.pathsep + own
        self.variables.update(variables)
        self.variables[MARK] = mark
        folder = str(Path(sys.executable).parent)
        self.variables["PATH"] = folder + os.pathsep + self.variables.get("PATH", os.defpath)
        added = [part for part in variables.get("PYTHONPATH", "").split(os.pathsep) if part]
        os.chdir(workdir)
        sys.path[:0] = added
        return platform.python_version()

    def do_packages(self, names):
        """Versions by name, None = not installed; `swift` with a hash of its code."""
        found = {}
        for name in names:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
        spec = importlib.util.find_spec("swift")
        found["swift"] = None
        if spec and spec.origin:
            digest = hashlib.sha256()
            for path in sorted(Path(spec.origin).parent.rglob("*.py")):
                digest.update(path.read_bytes())
            found["swift"] = "code " + digest.hexdigest()[:8]
        return found

    def do_machine(self):
        """GPUs as [name, MiB in all, MiB free], and the bytes of memory that are free."""
        free = 0
        with suppress(OSError):
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        gpus = list_gpus()
        chosen = self.variables.get("CUDA_VISIBLE_DEVICES")
        if chosen is not None:
            names = [name.strip() for name in chosen.split(",") if name.strip()]
            picked = [gpus[int(name)] for name in names if name.isdigit() and int(name) < len(gpus)]
            gpus = picked or gpus[: len(names)]
        return {"gpus": gpus, "memory": free}

    def do_listen(self, port):
        """Opens `port`, 0 = any; its number. Open until `hush`."""
        listener = socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET)
        if socket.has_ipv6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen(64)
        self.sockets.append(listener)
        return listener.getsockname()[1]

    def do_hush(self):
        while self.sockets:
            self.sockets.pop().close()

    def do_connect(self, targets, patience):
        """What went wrong with each [host, port], None = nothing."""

        def attempt(target):
            try:
                return socket.create_connection(tuple(target), timeout=patience).close()
            except OSError as error:
                return str(error)

        with ThreadPoolExecutor(len(targets) or 1) as pool:
            return list(pool.map(attempt, targets))

    def do_interface(self, target):
        """The network interface that packets to `target` leave by."""
        family, _, _, _, address = socket.getaddrinfo(target, 1, 0, socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # one without an IPv4 address
                    request = struct.pack("256s", name.encode()[:15])
                    if own == socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]):
                        return name
        return None

    def do_token(self, folder, name, write):
        """Leaves a file in the nearest directory of `folder` that is there, or looks for it."""
        place = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.is_dir())
        token = place / name
        if write != "look":
            return [str(place), token.touch() if write == "write" else token.unlink()]
        deadline = time.monotonic() + 5  # network file systems remember for seconds what was not there
        while not token.exists() and time.monotonic() < deadline:
            list(place.iterdir())
            time.sleep(0.2)
        return [str(place), token.exists()]

    def do_digest(self, paths):
        """A hash of each file or directory, None where there is nothing."""
        return [self._digest(Path(path).expanduser()) for path in paths]

    def _digest(self, path):
        if not path.exists():
            return None
        digest, whole = hashlib.sha256(), path.is_file()
        files = [path] if whole else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            name = file.relative_to(path)
            if any(part.startswith(".") for part in name.parts):
                continue
            size = file.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            all_of_it, parts = whole and size <= WHOLE_BYTES, 64 if whole else 2
            with file.open("rb") as handle:
                for step in range(1 if all_of_it else parts + 1):
                    handle.seek(max(0, size - SAMPLE_BYTES) * step // parts)
                    digest.update(handle.read(-1 if all_of_it else SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    def do_run(self, words, variables, limit):
        """Runs `python WORDS` to its end; exit code and the end of its output."""
        process = self._start(words, variables)
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            return [124, f"no end after {limit} s"]
        return [process.returncode, output.decode(errors="replace")[-4000:]]

    def do_start(self, words, variables, patience=0.0):
        """Starts `python WORDS`; lines follow, `hang` for ranks that stand still, and `exit`."""
        self._sweep()  # a launch before this one that lost its connection may still be ending
        self.stopping = False
        self.folder = self.folder or tempfile.mkdtemp(prefix="swift-launch-")
        for path in Path(self.folder).glob("beat-*"):  # of a start before this one
            path.unlink()
        self.patience = patience
        # torchrun writes each process's output to a file, and passes it on with the rank in front.
        ranks = {"PET_TEE": "3", "PET_LOG_DIR": self.folder, "SWIFT_BEATS": self.folder}
        ranks["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank${rank}] "
        self.child = self._start(words, {**ranks, **variables})
        threading.Thread(target=self._follow, args=(self.child,), daemon=True).start()

    def find_hung(self):
        """[rank, seconds, phase, state, stacks] of ranks without progress, once; see utils/beat.py."""
        found = []
        for path in Path(self.folder).glob("beat-*") if self.patience else ():
            with suppress(OSError, ValueError):
                seconds = time.time() - path.stat().st_mtime
                pid, _, phase = path.read_text().partition(" ")
                state = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0]
                if seconds > self.patience:
                    os.kill(int(pid), signal.SIGUSR1)
                    found.append([int(path.name[5:]), round(seconds), phase, state])
        if found:
            self.patience = 0.0
            time.sleep(1.0)  # for the stacks
        return [[*hung, Path(self.folder, f"stack-{hung[0]}").read_text()] for hung in found]

    def _start(self, words, variables):
        return subprocess.Popen(
            [sys.executable, "-u", *words],
            env={**self.variables, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _follow(self, child):
        def pass_on():
            for line in child.stdout:
                self.send(line=line.decode(errors="replace").rstrip("\r\n"))

        reader = threading.Thread(target=pass_on, daemon=True)
        reader.start()
        code = child.wait()
        reader.join(2.0)
        self._sweep()
        self.send(exit=code)

    def do_stop(self, name, grace):
        """Asks the command to end, and kills what is left after `grace` seconds; at once the second time."""
        child, again = self.child, self.stopping
        self.stopping = True
        if child and child.poll() is None and not again:
            with suppress(ProcessLookupError):
                child.send_signal(getattr(signal, name))
            with suppress(subprocess.TimeoutExpired):
                child.wait(grace)
        self._sweep()

    def _sweep(self):
        """Kills every process with our mark. Ranks have sessions of their own, so no group holds them all."""
        mark = f"{MARK}={self.variables.get(MARK)}".encode()
        deadline, quiet = time.monotonic() + 5, 0
        while time.monotonic() < deadline and quiet < 2:  # one that is being made has no environment yet
            found = []
            for entry in Path("/proc").iterdir():
                with suppress(OSError):
                    other = entry.name.isdigit() and int(entry.name) != os.getpid()
                    if other and mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
            for pid in found:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            quiet = 0 if found else quiet + 1
            time.sleep(0.1)

    def do_checkpoint(self, root, since):
        """The newest whole checkpoint below `root` that was written after `since`, None = there is none."""
        marks = [p for depth in ("*/", "*/*/") for p in Path(root).glob(depth + "manifest.json")]
        times = [(p.stat().st_mtime, p) for p in marks if p.parent.name.startswith("checkpoint-")]
        fresh = [(moment, p) for moment, p in times if moment >= since and not p.parent.is_symlink()]
        return str(max(fresh)[1].parent.absolute()) if fresh else None


def list_gpus():
    """GPUs of this machine as [name, MiB in all, MiB free], by nvidia-smi; none where there is no such."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    if not shutil.which(query[0]):
        return []
    done = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    gpus = []
    for line in done.stdout.decode().splitlines() if done.returncode == 0 else ():
        name, total, left = (part.strip() for part in line.rsplit(",", 2))
        known = total.isdigit() and left.isdigit()  # some have no memory of their own
        gpus.append([name, int(total), int(left)] if known else [name, 0, 0])
    return gpus


def main(variables):
    """Serves the launcher at the other end of stdin and stdout."""
    Agent(variables).serve()
