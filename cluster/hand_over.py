"""Did KV caches really go from prefill to decode replicas? Read from what the router tells before and after a run.

Engines fall back silently: a decode replica that finds nothing computes the prompt itself, and what would be measured
is no disaggregated serving. Where an engine counts the tokens that it received, a run in which none came is a failure.
"""

from __future__ import annotations

from pydantic import BaseModel, Field, ValidationError

from search_spaces.outcome import Failure, FailureReason

RECEIVED = "kv_tokens_received_total"


class _Stats(BaseModel):
    """What is read of `/router/stats`."""

    mode: str
    engine_metrics: dict[str, dict[str, float]] = Field(default_factory=dict)

    @property
    def received(self) -> float | None:
        """Prompt tokens whose KV cache came from another replica, since the start; None where no engine counts them."""
        counts = [figures[RECEIVED] for figures in self.engine_metrics.values() if RECEIVED in figures]
        return sum(counts) if counts else None


def tokens_handed_over(before: str | None, after: str | None) -> float | None:
    """Prompt tokens whose KV cache was handed over between two answers of `/router/stats`; None where nobody counts."""
    first, last = _received(before), _received(after)
    return None if first is None or last is None else last - first


def _received(stats: str | None) -> float | None:
    if stats is None:
        return None
    try:
        found = _Stats.model_validate_json(stats)
    except ValidationError:
        return None
    return found.received if found.mode == "disaggregated" else None


def not_handed_over() -> Failure:
    """The failure of a disaggregated run in which decode replicas computed every prompt themselves."""
    return Failure(
        reason=FailureReason.REQUESTS_FAILED,
        detail="no KV cache came from a prefill replica: decode replicas computed every prompt themselves, which is no "
        "disaggregated serving; are prompts shorter than two KV blocks, or is the connector set up wrongly?",
    )
