"""`swift` and `megatron` on PATH that start at once: forked from a process that has imported everything.

The commands are the real ones, with the caller's arguments, directory, environment and open files; only the
seconds of importing torch and transformers are saved. A signal to the program on PATH reaches the command.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

CLIENT = """\
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
job = {{"program": {program!r}, "arguments": sys.argv[1:], "directory": os.getcwd()}}
text = json.dumps({{**job, "environment": dict(os.environ)}}).encode()
socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2])
server.sendall(text)
answers = server.makefile("r")
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(process, number))
sys.exit(int(answers.readline()))
"""


class ForkedSwift:
    """The process that commands are forked from, and the folder whose programs ask it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        path = folder / "socket"
        for program in ("swift", "megatron"):
            client = CLIENT.format(path=str(path), program=program)
            file = self.bin / program
            file.write_text(f"#!{sys.executable} -IS\n{client}")
            file.chmod(0o755)
        command = [
            sys.executable,
            "-c",
            "import sys, forked_swift; forked_swift.serve(sys.argv[1])",
            str(path),
        ]
        search = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
        self.server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        while not path.exists():
            assert self.server.poll() is None, "the server has ended"
            time.sleep(0.05)

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()


def serve(path: str) -> None:
    """Answers until it is ended."""
    for name in ("swift.train.run", "swift.infer.run", "swift.export.run", "swift.dataset.run", "peft"):
        importlib.import_module(name)
    for family in ("llama", "qwen3"):
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    waiting = socket.socket(socket.AF_UNIX)
    waiting.bind(f"{path}.new")
    waiting.listen(16)
    Path(f"{path}.new").rename(path)  # whoever sees it can connect
    while True:
        client, _ = waiting.accept()
        head, files, _, _ = socket.recv_fds(client, 8, 3)
        text = b""
        while len(text) < int.from_bytes(head, "big"):
            text += client.recv(65536)
        process = os.fork()
        if not process:
            waiting.close()
            client.close()
            work(json.loads(text), files)
        for file in files:
            os.close(file)
        client.sendall(f"{process}\n".encode())
        threading.Thread(target=finish, args=(client, process), daemon=True).start()


def finish(client: socket.socket, process: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    client.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    client.close()


def work(job: dict, files: list[int]) -> None:
    """The command, in a process of its own; does not return."""
    code = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        # Opened anew: what Python knew of the old files, such as whether one can seek, is not true of these.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        os.chdir(job["directory"])
        os.environ.clear()
        os.environ.update(job["environment"])
        sys.argv = [job["program"], *job["arguments"]]
        from swift.cli.main import run

        code = run(job["arguments"], program=job["program"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
