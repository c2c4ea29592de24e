"""From the timings of a run to its figures. Pure.

Latencies are those of the measured requests that completed, in milliseconds:

- TTFT = first token - send,
- E2E = last token - send,
- TPOT = (E2E - TTFT) / (OSL - 1) of each request, OSL being the server's token count,
- ITL = every gap between two token events of a request, all requests pooled, raw.

Percentiles interpolate linearly between order statistics (NumPy's default).

Rates are taken over the *measured window*: from the sending of the first measured request to the end of the last one.
The load stands before it and goes on after it, so other requests overlap it at both ends. Counting only measured
requests would understate the rate (they share the window with others), counting whoever ends in it would overstate it
where requests run in step. So every output token that
arrives within the window counts, whoever's request it belongs to (`0 < arrival - start <= duration`), and a request
counts for the share of its tokens that does: requests/s is the sum of those shares per second, and input tokens/s the
sum of prompt tokens so weighted. Under a steady load this is unbiased, and it does not grow with a queue under an open
loop that outruns the server. Failed requests count nowhere.

Goodput is requests/s times the share of the measured completed requests that meet every SLO on a latency. An SLO on
`ttft`, `tpot` or `e2e` holds each request's own value against the threshold, whichever statistic it names; one on `itl`
holds that statistic of the request's own gaps. An SLO on an aggregate (throughput, cost, error rate) says nothing about
one request and is left out here; the study judges it on the aggregate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.load.timings import ErrorClass, Phase, RequestTiming
from search_spaces.errors import TunerError
from search_spaces.metrics import LATENCIES, Percentiles, ServingMetrics, other_percentiles, percentile_level
from search_spaces.problem import Slo

_NS_PER_MS = 1e6
_NS_PER_S = 1e9


class NothingMeasuredError(TunerError):
    """The timings hold too little for figures: no measured request completed, or no answer was streamed."""


@dataclass(frozen=True, kw_only=True)
class RequestLatency:
    """Latencies of one completed request in milliseconds; `tpot_ms` is None where only one token was asked for."""

    ttft_ms: float
    tpot_ms: float | None
    itl_ms: tuple[float, ...]
    e2e_ms: float


def request_latency(timing: RequestTiming) -> RequestLatency:
    """Latencies of one completed request."""
    times = np.asarray(timing.token_ns, dtype=np.int64)
    ttft_ms = float(times[0] - timing.sent_ns) / _NS_PER_MS
    e2e_ms = float(times[-1] - timing.sent_ns) / _NS_PER_MS
    more = timing.output_tokens - 1
    return RequestLatency(
        ttft_ms=ttft_ms,
        tpot_ms=(e2e_ms - ttft_ms) / more if more > 0 else None,
        itl_ms=tuple((np.diff(times) / _NS_PER_MS).tolist()),
        e2e_ms=e2e_ms,
    )


def percentiles(values: Sequence[float]) -> Percentiles:
    """Mean and percentiles of `values` (at least one)."""
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, [50, 90, 95, 99]))
    return Percentiles(mean=float(np.mean(values)), p50=p50, p90=p90, p95=p95, p99=p99)


def _statistic(values: Sequence[float], statistic: str) -> float:
    """The mean, or any percentile, of `values` (at least one)."""
    level = percentile_level(statistic)
    return float(np.mean(values)) if level is None else float(np.percentile(values, 100 * level))


def latency_slos(slos: Iterable[Slo]) -> tuple[Slo, ...]:
    """The SLOs that say something about one request."""
    return tuple(slo for slo in slos if slo.metric.split("_")[0] in LATENCIES)


def meets(latency: RequestLatency, slos: Iterable[Slo]) -> bool:
    """Whether one request meets every SLO on a latency."""
    return all(slo.violation(_judged_value(latency, slo.metric)) <= 0 for slo in latency_slos(slos))


def _judged_value(latency: RequestLatency, metric: str) -> float:
    """The request's value that an SLO on `metric` judges; 0 for gaps that a request of one event does not have."""
    kind, statistic, _unit = metric.split("_")
    if kind == "itl":
        return _statistic(latency.itl_ms, statistic) if latency.itl_ms else 0.0
    return {"ttft": latency.ttft_ms, "tpot": latency.tpot_ms or 0.0, "e2e": latency.e2e_ms}[kind]


def measured_window_ns(timings: Sequence[RequestTiming]) -> tuple[int, int]:
    """Start and end of the measured window; raises `NothingMeasuredError` where no measured request completed."""
    measured = [timing for timing in timings if timing.phase is Phase.MEASURED]
    completed = [timing for timing in measured if timing.completed]
    if not completed:
        failed = sum(timing.failed for timing in measured)
        raise NothingMeasuredError(f"none of {len(measured)} measured requests completed ({failed} failed)")
    return min(timing.sent_ns for timing in measured), max(timing.token_ns[-1] for timing in completed)


def summarise(
    timings: Sequence[RequestTiming], *, slos: Sequence[Slo], devices: int, price_per_hour: float
) -> ServingMetrics:
    """The figures of a run on `devices` reserved devices; raises `NothingMeasuredError`."""
    start_ns, end_ns = measured_window_ns(timings)
    measured = [timing for timing in timings if timing.phase is Phase.MEASURED]
    completed = [timing for timing in measured if timing.completed]
    latencies = [request_latency(timing) for timing in completed]
    gaps = [gap for latency in latencies for gap in latency.itl_ms]
    if not gaps:
        raise NothingMeasuredError(
            f"each of {len(completed)} answers came in one event, so there is no ITL; the server must stream its tokens"
        )
    rates = _rates(timings, start_ns, end_ns)
    good_share = sum(meets(latency, slos) for latency in latencies) / len(latencies)
    values = {
        "ttft": [latency.ttft_ms for latency in latencies],
        "tpot": [latency.tpot_ms for latency in latencies if latency.tpot_ms is not None],
        "itl": gaps,
        "e2e": [latency.e2e_ms for latency in latencies],
    }
    return ServingMetrics(
        ttft_ms=percentiles(values["ttft"]),
        tpot_ms=percentiles(values["tpot"]),
        itl_ms=percentiles(values["itl"]),
        e2e_ms=percentiles(values["e2e"]),
        percentiles_ms=_asked_for(values, slos),
        output_tokens_per_s=rates.output_tokens_per_s,
        input_tokens_per_s=rates.input_tokens_per_s,
        requests_per_s=rates.requests_per_s,
        goodput_rps=rates.requests_per_s * good_share,
        requests=len(completed),
        errors=sum(timing.failed for timing in measured),
        duration_s=(end_ns - start_ns) / _NS_PER_S,
        devices=devices,
        price_per_hour=price_per_hour,
    )


def _asked_for(values: Mapping[str, Sequence[float]], slos: Sequence[Slo]) -> dict[str, float]:
    """Percentiles that an SLO is on and that no measurement has by itself, by name of metric."""
    found: dict[str, float] = {}
    for slo in slos:
        for statistic in other_percentiles([slo.metric]):
            found[slo.metric] = _statistic(values[slo.metric.split("_")[0]], statistic)
    return found


@dataclass(frozen=True, kw_only=True)
class _Rates:
    output_tokens_per_s: float
    input_tokens_per_s: float
    requests_per_s: float


def _rates(timings: Sequence[RequestTiming], start_ns: int, end_ns: int) -> _Rates:
    """Rates over the window.

    An event weighs the tokens that it carries: those of the request over its events. A request that was still in flight
    at the end has neither count; it weighs what the completed ones do on average, and its tokens are those asked for.
    """
    completed = [timing for timing in timings if timing.completed]
    usual = sum(timing.output_tokens for timing in completed) / sum(len(timing.token_ns) for timing in completed)
    output_tokens = input_tokens = requests = 0.0
    for timing in timings:
        if timing.failed or not timing.token_ns:
            continue
        inside = sum(start_ns < at <= end_ns for at in timing.token_ns)
        total = timing.output_tokens if timing.completed else timing.planned_tokens
        tokens = inside * (timing.output_tokens / len(timing.token_ns) if timing.completed else usual)
        share = min(1.0, tokens / total)
        output_tokens += tokens
        input_tokens += share * timing.input_tokens
        requests += share
    duration_s = (end_ns - start_ns) / _NS_PER_S
    return _Rates(
        output_tokens_per_s=output_tokens / duration_s,
        input_tokens_per_s=input_tokens / duration_s,
        requests_per_s=requests / duration_s,
    )


def failed_by_class(timings: Iterable[RequestTiming]) -> dict[ErrorClass, int]:
    """How many requests failed in which way; those abandoned at the end of the run are none of them."""
    counts: dict[ErrorClass, int] = {}
    for timing in timings:
        if timing.failed and timing.error is not None:
            counts[timing.error] = counts.get(timing.error, 0) + 1
    return counts
