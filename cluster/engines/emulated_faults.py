"""What an emulated engine says and does when it fails on request, in the words that production engines end with."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from typing import NoReturn

from search_spaces.emulation import Fault, FaultKind, GpuMemory

GIB = 2.0**30
ENGINE_ERROR, USAGE_ERROR = 1, 2
"""Exit codes of a Python program that raised, and of one whose arguments were refused."""


def end(code: int, *lines: str) -> NoReturn:
    """Write `lines` and end the process at once."""
    sys.stdout.flush()
    print("\n".join(lines), file=sys.stderr, flush=True)
    os._exit(code)


def out_of_memory(memory: GpuMemory, wanted_bytes: float) -> NoReturn:
    """End as for an allocation that a GPU refused."""
    free = max(0.0, memory.total_bytes - memory.weight_bytes - memory.fixed_bytes)
    end(
        ENGINE_ERROR,
        "ERROR EngineCore failed (emulated)",
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {wanted_bytes / GIB:.2f} GiB. GPU 0 has a "
        f"total capacity of {memory.total_bytes / GIB:.2f} GiB of which {free / GIB:.2f} GiB is free.",
    )


def kv_cache_too_small(longest: int, tokens: int) -> NoReturn:
    """End as for a KV cache that cannot hold a single request."""
    end(
        ENGINE_ERROR,
        "ERROR EngineCore failed (emulated)",
        f"ValueError: a request holds up to {longest} tokens, which is larger than the maximum number of tokens that "
        f"can be stored in KV cache ({tokens}). Try increasing gpu_memory_utilization or decreasing max_model_len.",
    )


def invalid_flags(what: str) -> NoReturn:
    """End as for arguments that the engine does not take."""
    end(USAGE_ERROR, f"emulated engine: error: {what}")


def fail_at_boot(fault: Fault, memory: GpuMemory, longest: int) -> None:
    """Do what a `fault` of the start does; return where the start goes on."""
    match fault.kind:
        case FaultKind.OUT_OF_MEMORY_AT_BOOT:
            out_of_memory(memory, memory.weight_bytes / 40.0)
        case FaultKind.KV_CACHE_TOO_SMALL:
            kv_cache_too_small(longest, longest // 2)
        case FaultKind.INVALID_FLAGS:
            invalid_flags("unrecognized arguments: --on-request")
        case FaultKind.CRASH_AT_BOOT:
            crash()
        case FaultKind.HANG_AT_BOOT:
            print("waiting for the other ranks (emulated hang)", flush=True)
            while True:
                time.sleep(3600.0)
        case FaultKind.SLOW_START:
            print(f"loading weights takes {fault.seconds:g} s more than usual (emulated)", flush=True)
            time.sleep(fault.seconds)
        case FaultKind.PORT_IN_USE:
            end(ENGINE_ERROR, "OSError: [Errno 98] address already in use (emulated)")
        case _:
            return


def crash() -> NoReturn:
    """End as native code does that touches what is not its own."""
    print("Fatal Python error: Segmentation fault (emulated)", file=sys.stderr, flush=True)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("unreachable")


def device_lost() -> NoReturn:
    """End as for a GPU that is broken."""
    end(ENGINE_ERROR, "RuntimeError: CUDA error: uncorrectable ECC error encountered (emulated)")


def fail_under_load(kind: FaultKind, memory: GpuMemory) -> None:
    """Do what a fault does that ends the process at a request; return where it is none of these."""
    match kind:
        case FaultKind.OUT_OF_MEMORY_UNDER_LOAD:
            out_of_memory(memory, 2.0 * GIB)
        case FaultKind.CRASH_UNDER_LOAD:
            crash()
        case FaultKind.DEVICE_LOST:
            device_lost()
        case _:
            return


class RequestFaults:
    """Says which requests a fault under load strikes."""

    def __init__(self, fault: Fault | None, seed: str) -> None:
        self._fault = fault
        self._rng = random.Random(f"{seed}|faults")  # noqa: S311  no secret
        self._requests = 0

    def next(self) -> FaultKind | None:
        """The fault of the request that comes now, None for a sound one."""
        self._requests += 1
        if self._fault is None or self._requests <= self._fault.after_requests:
            return None
        return self._fault.kind if self._rng.random() < self._fault.share else None
