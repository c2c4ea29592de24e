"""Which of several accounts of one failure tells what really happened (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from search_spaces.outcome import Failure, FailureReason

_TELLING = (
    FailureReason.LOST_NODE,
    FailureReason.OUT_OF_MEMORY_AT_BOOT,
    FailureReason.OUT_OF_MEMORY_UNDER_LOAD,
    FailureReason.KV_CACHE_TOO_SMALL,
    FailureReason.INVALID_FLAGS,
    FailureReason.UNHEALTHY_NODE,
    FailureReason.ENGINE_CRASH,
    FailureReason.LOST_COORDINATOR,
    FailureReason.PLACEMENT,
    FailureReason.TRANSPORT,
    FailureReason.STARTUP_TIMEOUT,
    FailureReason.MEASUREMENT_TIMEOUT,
    FailureReason.REQUESTS_FAILED,
    FailureReason.LATE_CLIENT,
)
"""Causes before their consequences: when a node goes, the other parts of a replica crash, and requests fail."""


def depth(failure: Failure) -> int:
    """How far `failure` is from the cause: 0 for what explains everything else."""
    return _TELLING.index(failure.reason)


def most_telling(first: Failure, others: Sequence[Failure]) -> Failure:
    """The account nearest to the cause, with what `first`, the one that was heard first, says and holds besides."""
    chosen = min((first, *others), key=depth)
    if chosen is first:
        return first
    besides = "" if first.detail in chosen.detail else f"; {first.detail}"
    return replace(
        chosen,
        detail=chosen.detail + besides,
        artifacts={**first.artifacts, **chosen.artifacts},
        timings_s={**first.timings_s, **chosen.timings_s},
    )
