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
from enum import IntEnum
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

API_KEY_VARIABLE = "TUNER_API_KEY"
"""Names the environment variable whose value clients must send as a bearer token, to replicas and router alike."""
PARENT_VARIABLE = "TUNER_PARENT_PID"
"""Names the environment variable in which a starting process may leave its id (see `die_with_parent`)."""
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_POLL_S = 0.5

Spec = TypeVar("Spec", bound=BaseModel)


class Exit(IntEnum):
    """Exit codes (numbers as in sysexits.h) with which a process that cannot serve says why."""

    INVALID_OPTIONS = 64
    MODEL_NOT_LOADED = 66
    PORT_IN_USE = 69
    ORPHANED = 70
    OUT_OF_MEMORY = 71


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


def die_while_loading() -> None:
    """Let the kernel kill this process when the *thread* that started it ends (Linux), until `die_with_parent`.

    This works while native code holds the interpreter lock, as engines do while they load. It is meant for that time
    only: the signal follows the starting thread, and a thread may well end before its process does.
    """
    _set_parent_death_signal(int(signal.SIGKILL))
    _check_parent(_parent())


def die_with_parent() -> None:
    """Exit at once when the parent *process* ends; a daemon thread waits for that.

    The parent is named by a pidfd (Linux 5.3), which is told at once and cannot be mistaken for a later process; where
    there is none, the parent's id is polled twice a second. A parent that ended before this call is only noticed where
    it left its process id in the environment variable TUNER_PARENT_PID.
    """
    parent = _parent()
    threading.Thread(target=_wait_and_exit, args=(parent,), name="parent-watch", daemon=True).start()
    _set_parent_death_signal(0)


def _parent() -> int:
    return int(os.environ.get(PARENT_VARIABLE, os.getppid()))


def _set_parent_death_signal(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _check_parent(parent: int) -> None:
    if os.getppid() != parent:
        print(f"the parent process {parent} is gone: ending", file=sys.stderr, flush=True)
        os._exit(Exit.ORPHANED)


def _wait_and_exit(parent: int) -> None:
    _wait_for_end(parent)
    _check_parent(parent)


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
    while os.getppid() == parent:  # it has ended, but its children have not been given another parent yet
        time.sleep(0.001)
