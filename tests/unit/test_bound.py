"""Processes that end with the one that started them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = (
    "import time; from swift.utils.bound import end_with_parent; end_with_parent();"
    "print('up', flush=True); time.sleep(60)"
)
PARENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=-1);"
    "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
)


def lives(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone knows how")
def test_a_child_ends_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    child = parent.stdout.readline().strip()
    assert lives(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while lives(child):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.02)
