"""What the last lines of a GPU engine's log say of its end, whichever engine it is."""

from __future__ import annotations

from search_spaces.outcome import FailureReason

_SIGNS: tuple[tuple[FailureReason, tuple[str, ...]], ...] = (
    (
        FailureReason.UNHEALTHY_NODE,
        (
            "uncorrectable ecc",
            "fallen off the bus",
            "gpu is lost",
            "no cuda-capable device",
            "cuda-capable device(s) is/are busy",
            "cuda driver version is insufficient",
            "found no nvidia driver",
            "nvml_error",
            "driver/library version mismatch",
            "no space left on device",
        ),
    ),
    (
        FailureReason.KV_CACHE_TOO_SMALL,
        (
            "can be stored in kv cache",
            "no available memory for the cache blocks",
            "larger than the available kv cache memory",
            "not enough memory for the kv cache",
            "not enough memory. please try to increase --mem-fraction-static",
            "must be large enough to process at least 1 sequence to completion",
        ),
    ),
    (
        FailureReason.INVALID_FLAGS,
        (
            "unrecognized arguments",
            "invalid choice:",
            "the following arguments are required",
            "no such option:",
            "validation error for",
            "is greater than the derived max_model_len",
            "extra inputs are not permitted",
        ),
    ),
)
_OUT_OF_MEMORY = (
    "cuda out of memory",
    "cuda error: out of memory",
    "triton error [cuda]: out of memory",
    "outofmemoryerror",
    "cublas_status_alloc_failed",
    "hip out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "alloc_req_slots runs out of memory",
)
_TRANSPORT = (
    "address already in use",
    "eaddrinuse",
    "nixl_err_",
    "nixl transfer failure",
    "remote nixl agent engine id mismatch",
    "registermem: registration failed",
    "kvtransfererror",
    "unhandled system error",
    "remote process exited or there was a network error",
    "connection closed by peer",
)
"""Looked for last: connections break where a process at the other end has died of something else."""


def reason_in_log(log_tail: str, *, ready: bool) -> FailureReason | None:
    """Class of the failure that `log_tail` tells of, None where it does not; `ready` tells boot from load.

    The more special words come first: a broken GPU and a small KV cache also speak of memory.
    """
    text = log_tail.lower()
    memory = FailureReason.OUT_OF_MEMORY_UNDER_LOAD if ready else FailureReason.OUT_OF_MEMORY_AT_BOOT
    for reason, signs in (*_SIGNS, (memory, _OUT_OF_MEMORY), (FailureReason.TRANSPORT, _TRANSPORT)):
        if any(sign in text for sign in signs):
            return reason
    return None


def telling_line(log_tail: str) -> str | None:
    """The first line of `log_tail` that tells of its class; None where none does."""
    reason = reason_in_log(log_tail, ready=True)
    if reason is None:
        return None
    return next((line for line in log_tail.splitlines() if reason_in_log(line, ready=True) is reason), None)
