"""What engines that live in an environment of their own have in common: our router before them, and their ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.engines.base import LaunchCommand, RouterSpec
from cluster.engines.flags import HelpRequest, check_flags
from cluster.engines.installation import Installation
from cluster.engines.log_signs import reason_in_log
from search_spaces.outcome import FailureReason

SIGKILL = -9
SHELL_KILLED = 137  # as shells and containers have it: 128 + SIGKILL
UCX_TLS = {"rdma": "rc,cuda_copy,cuda_ipc", "tcp": "tcp,cuda_copy", "shm": "sm,self,cuda_copy,cuda_ipc"}
"""What UCX, which NIXL and TensorRT-LLM go through, may use for each transport; on a CPU without the parts for GPUs."""
USAGE_ERROR = 2  # as Python's argparse and click have it


@dataclass(frozen=True, kw_only=True)
class PairedRouter:
    """How our router hands requests over from prefill to decode replicas, and what it records of `/metrics`.

    `protocol` is one of `cluster.router.options.Protocol`. `side_ports` are those of the prefill replicas in the order
    of their URLs, where the protocol tells clients of them.
    """

    protocol: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    side_ports: tuple[int, ...] = ()


def paired_router_command(router: RouterSpec, pairing: PairedRouter) -> LaunchCommand:
    """The process of our router before replicas of an engine that pairs by `pairing`."""
    spec = {
        "host": router.host,
        "port": router.port,
        "mixed_urls": router.mixed_urls,
        "prefill_urls": router.prefill_urls,
        "decode_urls": router.decode_urls,
        "protocol": pairing.protocol,
        "metrics": dict(pairing.metrics),
        "prefill_side_ports": pairing.side_ports,
        "slot_dir": str(router.shared_dir),
    }
    return LaunchCommand(argv=(sys.executable, "-m", "cluster.router", "--spec", json.dumps(spec)))


def classify_by_log(exit_code: int | None, log_tail: str, *, ready: bool) -> FailureReason:
    """Class of a failure by what the log says, then by the exit code; alive (None), by what was waited for.

    A process that was killed without a word is taken for the kernel's answer to exhausted memory.
    """
    if exit_code is None:
        return FailureReason.REQUESTS_FAILED if ready else FailureReason.STARTUP_TIMEOUT
    found = reason_in_log(log_tail, ready=ready)
    if found is not None:
        return found
    if exit_code in {SIGKILL, SHELL_KILLED}:
        return FailureReason.OUT_OF_MEMORY_UNDER_LOAD if ready else FailureReason.OUT_OF_MEMORY_AT_BOOT
    return FailureReason.INVALID_FLAGS if exit_code == USAGE_ERROR else FailureReason.ENGINE_CRASH


def checked_version(engine: str, installation: Installation, command: LaunchCommand, request: HelpRequest) -> str:
    """Version of the engine that `command` starts; raises `InvalidValueError` for flags that it does not know."""
    program = installation.program(engine)
    return check_flags(engine, program, command.argv[len(program) :], request, command.env)
