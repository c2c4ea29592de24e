"""Ends this process when the one that started it is gone, however that one ended."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
EXIT_ORPHANED = 70
_POLL_S = 0.5


def die_with_parent_thread(enabled: bool) -> None:
    """Let the kernel kill this process when the *thread* that started it ends, or stop doing so (Linux only).

    This works while native code holds the interpreter lock, as engines do while they load. It is meant for that time
    only: the signal follows the starting thread, and a thread may well end before its process does.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL) if enabled else 0, 0, 0, 0)


def die_with_parent() -> None:
    """Exit at once when the parent *process* ends; a daemon thread waits for that.

    The parent is named by a pidfd (Linux 5.3), which is told at once and cannot be mistaken for a later process; where
    there is none, the parent's id is polled twice a second.
    """
    parent = os.getppid()
    threading.Thread(target=_wait_and_exit, args=(parent,), name="parent-watch", daemon=True).start()


def _wait_and_exit(parent: int) -> None:
    _wait_for_end(parent)
    print(f"the parent process {parent} is gone: ending", file=sys.stderr, flush=True)
    os._exit(EXIT_ORPHANED)


def _wait_for_end(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except (AttributeError, OSError):  # no such call here, or the parent has gone already
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while os.getppid() == parent and not poll.poll(None):
        continue
