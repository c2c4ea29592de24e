"""What the last lines of a GPU engine's log say of its end, whichever engine it is."""

from __future__ import annotations

from search_spaces.outcome import FailureReason

_SIGNS: tuple[tuple[FailureReason, tuple[str, ...]], ...] = (
    (
        FailureReason.UNHEALTHY_NODE,
        (
            "uncorrectable ecc",
            "fallen off the bus",
            "no cuda-capable device",
            "cuda-capable device(s) is/are busy",
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
            "not enough memory for the kv cache",
        ),
    ),
    (FailureReason.TRANSPORT, ("address already in use",)),
    (
        FailureReason.INVALID_FLAGS,
        ("unrecognized arguments", "invalid choice:", "the following arguments are required"),
    ),
)
_OUT_OF_MEMORY = ("cuda out of memory", "outofmemoryerror", "cublas_status_alloc_failed", "hip out of memory")


def reason_in_log(log_tail: str, *, ready: bool) -> FailureReason | None:
    """Class of the failure that `log_tail` tells of, None where it does not; `ready` tells boot from load.

    The more special words come first: a broken GPU and a small KV cache also speak of memory.
    """
    text = log_tail.lower()
    for reason, signs in _SIGNS:
        if any(sign in text for sign in signs):
            return reason
    if any(sign in text for sign in _OUT_OF_MEMORY):
        return FailureReason.OUT_OF_MEMORY_UNDER_LOAD if ready else FailureReason.OUT_OF_MEMORY_AT_BOOT
    return None
