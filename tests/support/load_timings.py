"""Request timings made by hand, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.load.timings import ErrorClass, Phase, RequestTiming

NS_PER_MS = 1_000_000


def timing(  # noqa: PLR0913 - a request has that many sides, and a test names the one it is about
    sent_ms: float,
    tokens_ms: Sequence[float],
    *,
    index: int = 0,
    phase: Phase = Phase.MEASURED,
    output_tokens: int | None = None,
    planned_tokens: int | None = None,
    input_tokens: int = 100,
    error: ErrorClass | None = None,
    late_ms: float = 0.0,
    connect_ms: float = 0.0,
) -> RequestTiming:
    """A request sent at `sent_ms` whose token events arrived at `tokens_ms`."""
    counted = len(tokens_ms) if output_tokens is None else output_tokens
    return RequestTiming(
        index=index,
        phase=phase,
        scheduled_ns=round((sent_ms - late_ms) * NS_PER_MS),
        sent_ns=round(sent_ms * NS_PER_MS),
        connect_ns=round(connect_ms * NS_PER_MS),
        token_ns=tuple(round(at * NS_PER_MS) for at in tokens_ms),
        end_ns=round((tokens_ms[-1] if tokens_ms else sent_ms) * NS_PER_MS),
        input_tokens=input_tokens,
        planned_tokens=counted if planned_tokens is None else planned_tokens,
        output_tokens=counted,
        error=error,
        error_text="" if error is None else f"made up {error}",
    )
