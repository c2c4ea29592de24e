"""The one entry to the load generator: puts a load on an endpoint and says what was measured, or why nothing was."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.load.driver import LoadResult, LoadRun, Progress, run_load
from cluster.load.summary import NothingMeasuredError, failed_by_class, summarise
from cluster.load.timings import ErrorClass, Phase, RequestTiming, write_timings
from search_spaces.metrics import ServingMetrics
from search_spaces.outcome import Failure, FailureReason, Probe
from search_spaces.problem import Slo

TIMINGS_ARTIFACT = "request_timings"


@dataclass(frozen=True, kw_only=True)
class LoadMeasurement:
    """What a run gave.

    `lateness_ms` is the larger of two p99s: how long after they were due the measured requests were sent, and how late
    the client's event loop ran meanwhile. `connect_p99_ms` is the connecting time inside TTFT (0 where open
    connections were used again). `warm_up_s` and `measure_s` are the lengths of the phases, `requests_sent` counts all
    of the run, `errors_by_class` the measured requests that failed. `probes` are the runs of a search for the highest
    rate, over all of which the phases and requests are then summed.
    """

    metrics: ServingMetrics
    lateness_ms: float
    connect_p99_ms: float
    warm_up_s: float
    measure_s: float
    requests_sent: int
    errors_by_class: Mapping[ErrorClass, int]
    timings_path: Path
    probes: tuple[Probe, ...] = ()


LoadOutcome = LoadMeasurement | Failure


def measure(
    run: LoadRun, *, slos: Sequence[Slo], devices: int, price_per_hour: float, progress: Progress | None = None
) -> LoadOutcome:
    """Run the load in an event loop of its own, write the raw timings to `run.timings_path` and sum them up.

    Must not be called where an event loop runs already; there, await `run_load` and pass its result to `judge`.
    """
    result = asyncio.run(run_load(run, progress))
    write_timings(result.timings, run.timings_path)
    return judge(run, result, slos=slos, devices=devices, price_per_hour=price_per_hour)


def judge(run: LoadRun, result: LoadResult, *, slos: Sequence[Slo], devices: int, price_per_hour: float) -> LoadOutcome:
    """The measurement in `result`, or the first reason why it is none: failed requests, time, a late client."""
    failed = (
        _failed_requests(run, result) or _timed_out(run, result) or _late(run, result) or _read_at_once(run, result)
    )
    if failed is not None:
        return failed
    requests = result.timings.requests
    try:
        metrics = summarise(requests, slos=slos, devices=devices, price_per_hour=price_per_hour)
    except NothingMeasuredError as error:
        return _failure(run, result, FailureReason.REQUESTS_FAILED, str(error))
    measured = result.timings.of_phase(Phase.MEASURED)
    seconds = _phase_seconds(requests)
    return LoadMeasurement(
        metrics=metrics,
        lateness_ms=lateness_ms(result),
        connect_p99_ms=_p99_ms([timing.connect_ns for timing in measured]),
        warm_up_s=seconds["warm_up"],
        measure_s=seconds["measure"],
        requests_sent=len(requests),
        errors_by_class=failed_by_class(measured),
        timings_path=run.timings_path,
    )


def without_gate(run: LoadRun) -> LoadRun:
    """`run` whose client may be as late as it likes: its lateness is stated with the figures."""
    return replace(run, rule=replace(run.rule, lateness_limit_ms=float("inf")))


def lateness_ms(result: LoadResult) -> float:
    """p99 of how late the client sent or read: the validity gate."""
    sends = [timing.lateness_ns for timing in result.timings.of_phase(Phase.MEASURED)]
    return max(_p99_ms(sends), _p99_ms(result.loop_lag_ns))


def _failed_requests(run: LoadRun, result: LoadResult) -> Failure | None:
    """Too many failed: TRANSPORT where most never got a connection, REQUESTS_FAILED otherwise."""
    measured = result.timings.of_phase(Phase.MEASURED)
    counts = failed_by_class(measured)
    failed = sum(counts.values())
    if failed <= run.rule.error_limit * run.rule.requests:
        return None
    unconnected = counts.get(ErrorClass.CONNECT, 0) > failed / 2
    first = next(timing for timing in measured if timing.failed)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return _failure(
        run,
        result,
        FailureReason.TRANSPORT if unconnected else FailureReason.REQUESTS_FAILED,
        f"{failed} of {run.rule.requests} measured requests failed ({kinds}), more than the share of "
        f"{run.rule.error_limit:g} that the rule allows; the first, number {first.index}: {first.error_text}",
    )


def _timed_out(run: LoadRun, result: LoadResult) -> Failure | None:
    if not result.timed_out:
        return None
    ended = sum(_has_ended(timing) for timing in result.timings.of_phase(Phase.MEASURED))
    warm = sum(_has_ended(timing) for timing in result.timings.of_phase(Phase.WARM_UP))
    failed = [timing for timing in result.timings.requests if timing.failed]
    faults = f"; {len(failed)} failed, the first with: {failed[0].error_text}" if failed else ""
    return _failure(
        run,
        result,
        FailureReason.MEASUREMENT_TIMEOUT,
        f"{ended} of {run.rule.requests} measured requests (and {warm} of {run.warm_up_requests} of the warm-up) had "
        f"ended after {run.limit_s:g} s under {run.load}{faults}; raise measure_s or measure fewer "
        "requests",
    )


def _has_ended(timing: RequestTiming) -> bool:
    return timing.completed or timing.failed


def _late(run: LoadRun, result: LoadResult) -> Failure | None:
    late = lateness_ms(result)
    if late <= run.rule.lateness_limit_ms:
        return None
    return _failure(
        run,
        result,
        FailureReason.LATE_CLIENT,
        f"the load client was {late:.1f} ms late (p99), over its limit of {run.rule.lateness_limit_ms:g} ms, so that "
        "its timings are not the server's; give it cores of its own",
    )


def _read_at_once(run: LoadRun, result: LoadResult) -> Failure | None:
    """A client that found every answer complete when it came to read it: its events have no time between them."""
    answers = [timing.token_ns for timing in result.timings.of_phase(Phase.MEASURED) if timing.completed]
    several = [times for times in answers if len(times) > 1]
    if not several or any(times[-1] > times[0] for times in several):
        return None
    return _failure(
        run,
        result,
        FailureReason.LATE_CLIENT,
        f"all events of each of {len(several)} answers were read at one moment, so that there is no TPOT; give the "
        "load client cores of its own, and the server nothing before it that holds events back",
    )


def _failure(run: LoadRun, result: LoadResult, reason: FailureReason, detail: str) -> Failure:
    return Failure(
        reason=reason,
        detail=detail,
        artifacts={TIMINGS_ARTIFACT: str(run.timings_path)},
        timings_s=_phase_seconds(result.timings.requests),
    )


def _phase_seconds(requests: Sequence[RequestTiming]) -> dict[str, float]:
    """Seconds of warm-up (to the sending of the first measured request) and of measuring, as far as the run came."""
    if not requests:
        return {}
    measured = [timing for timing in requests if timing.phase is Phase.MEASURED]
    last_ns = max(timing.end_ns for timing in measured or requests)
    first_ns = min((timing.sent_ns for timing in measured), default=last_ns)
    return {"warm_up": first_ns / 1e9, "measure": (last_ns - first_ns) / 1e9}


def _p99_ms(values_ns: Sequence[int]) -> float:
    return float(np.percentile(values_ns, 99)) / 1e6 if values_ns else 0.0
