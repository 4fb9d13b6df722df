"""What this process is doing, in a file that the node's program of `swift launch` watches.

Without a launch nothing is written. A process that is asked why (SIGUSR1) writes its stacks beside the file.
"""

import faulthandler
import os
import signal
from functools import cache
from pathlib import Path
from typing import IO

from swift.utils import env


def beat(phase: str) -> None:
    """Tells that this process goes on, and with what."""
    folder = env.read("SWIFT_BEATS")
    if folder:
        rank = env.read("RANK", "0")
        _open_stacks(f"{folder}/stack-{rank}")
        Path(folder, f"beat-{rank}").write_text(f"{os.getpid()} {phase}", encoding="utf-8")


def rest() -> None:
    """Tells that nothing is to be expected any more."""
    folder = env.read("SWIFT_BEATS")
    if folder:
        Path(folder, f"beat-{env.read('RANK', '0')}").unlink(missing_ok=True)


@cache
def _open_stacks(path: str) -> IO[str]:
    file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - open for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    return file
