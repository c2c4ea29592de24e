"""What the processes that the cluster starts have in common: their options, their exits, and when they end."""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.processes import TAG_OWNER, ProcessId

API_KEY_VARIABLE = "TUNER_API_KEY"
"""Names the environment variable whose value clients must send as a bearer token, to replicas and router alike."""
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2  # <linux/prctl.h>
_POLL_S = 0.5

Spec = TypeVar("Spec", bound=BaseModel)


class Exit(IntEnum):
    """Exit codes (numbers as in sysexits.h) with which a process that cannot serve says why."""

    INVALID_OPTIONS = 64
    MODEL_NOT_LOADED = 66
    PORT_IN_USE = 69
    ORPHANED = 70
    OUT_OF_MEMORY = 71
    PEER_LOST = 72


def fail(code: Exit, message: str) -> NoReturn:
    """End the process with `code`; its last line says why."""
    sys.stdout.flush()
    print(f"cannot serve ({code.name.lower()}): {message}", file=sys.stderr, flush=True)
    os._exit(code)


def read_spec(kind: type[Spec], description: str) -> Spec:
    """The options of this process from its `--spec` argument, JSON or a file with it; ends the process for bad ones."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--spec", required=True, help=f"{kind.__name__} as JSON, or a file that holds it")
    text: str = parser.parse_args().spec
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        return kind.model_validate_json(text)
    except OSError as error:
        fail(Exit.INVALID_OPTIONS, f"the file with the options cannot be read: {error}")
    except ValidationError as error:
        fail(Exit.INVALID_OPTIONS, "; ".join(map(_fault_line, error.errors())))


def _fault_line(fault: ErrorDetails) -> str:
    """One fault that pydantic found, as `option=value: what is wrong`."""
    name = ".".join(map(str, fault["loc"]))
    return f"{name}={fault['input']!r}: {fault['msg']}" if name else str(fault["msg"])


@contextmanager
def bound_to_starting_thread() -> Iterator[None]:
    """Within the block, the kernel kills this process when the *thread* that started it ends (Linux).

    This works while native code holds the interpreter lock, as engines do while they load. It is meant for that time
    only: the signal follows the starting thread, and a thread may well end before its process does.
    """
    before = _exchange_parent_death_signal(int(signal.SIGKILL))
    try:
        yield
    finally:
        _exchange_parent_death_signal(before)


def die_with_owner() -> None:
    """Exit at once when the owner of this process ends, or now where it is gone; a daemon thread waits for that.

    The owner is the process that the tags in the environment name (see `cluster.processes.Tags`), else the parent. It
    is waited for by a pidfd (Linux 5.3), which is told at once; where there is none it is looked for twice a second.
    The first process of a container has neither, and ends with the container.
    """
    owner = ProcessId.parse(os.environ.get(TAG_OWNER, ""))
    if owner is None or not owner.is_here:
        if os.getppid() == 0:
            return
        owner = ProcessId.of(os.getppid())
    threading.Thread(target=_exit_after, args=(owner,), name="owner-watch", daemon=True).start()


def _exchange_parent_death_signal(number: int) -> int:
    """Set the signal that the end of the starting thread sends (0 for none) and return the one set before."""
    before = ctypes.c_int(0)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(before), 0, 0, 0)
        libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    return before.value


def _exit_after(owner: ProcessId) -> None:
    _wait_for_end(owner)
    print(f"the owner, process {owner.pid}, is gone: ending", file=sys.stderr, flush=True)
    os._exit(Exit.ORPHANED)


def _wait_for_end(owner: ProcessId) -> None:
    try:
        descriptor = os.pidfd_open(owner.pid)
    except (AttributeError, OSError):  # no such call here, or the owner has gone already
        while owner.is_alive:
            time.sleep(_POLL_S)
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while owner.is_alive and not poll.poll(None):
        continue
