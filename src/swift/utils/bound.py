"""Processes that do not outlive the one that started them."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
LIBRARY = ctypes.CDLL(None)  # loaded here: a child that was just forked must not


def end_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Linux sends this process `how` when the one that started it ends, however that ends.

    It is the thread that counts: one that ends earlier takes its children along. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        LIBRARY.prctl(PR_SET_PDEATHSIG, how)
