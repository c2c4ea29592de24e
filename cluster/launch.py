"""Becomes another program that dies with the thread that launched it and keeps to given cores.

    python -I -S launch.py [--cores 0,1] -- PROGRAM ARGUMENTS...

A small program and not a `preexec_fn`, which is unsafe in a process with threads such as a Ray worker. Standard library
only, and run by path without site packages: it costs some 15 ms. The process id stays the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; kept by execve
EXIT_NOT_FOUND = 127  # as shells have it


def main(arguments: list[str]) -> None:
    """Set up this process and replace its program."""
    split = arguments.index("--")
    options, command = arguments[:split], arguments[split + 1 :]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if options:
            os.sched_setaffinity(0, [int(core) for core in options[1].split(",")])
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's workers block some signals, and children inherit that
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; ours are ended in turn
    try:
        os.execvp(command[0], command)  # noqa: S606  no shell is the point
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr)
        sys.exit(EXIT_NOT_FOUND)


if __name__ == "__main__":
    main(sys.argv[1:])
