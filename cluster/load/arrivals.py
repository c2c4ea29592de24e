"""When requests are sent in an open loop: on schedule, whatever the server does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, count, repeat

import numpy as np

from search_spaces.errors import InvalidValueError
from search_spaces.workload import Arrival, Load

_ARRIVAL_STREAM = 2  # apart from the streams of `cluster.load.prompts`


def arrival_times_s(load: Load, seed: int) -> Iterator[float]:
    """Endless send times in seconds from the start of the run, the first at 0.

    Poisson arrivals have independent exponential gaps of mean 1 / rate; constant ones have gaps of 1 / rate. Raises
    `InvalidValueError` for a closed loop, which has no schedule.
    """
    rate = load.request_rate
    if rate is None:
        raise InvalidValueError(f"{load} is a closed loop and has no arrival times; give a request rate")
    if load.arrival is Arrival.TRACE:
        raise InvalidValueError(f"{load} arrives as in a trace; take its times from there")
    if load.arrival is Arrival.CONSTANT:
        return (index / rate for index in count())
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ARRIVAL_STREAM,)))
    gaps = (float(generator.exponential(mean)) for mean in repeat(1.0 / rate))
    return accumulate(gaps, initial=0.0)


def traced_times_s(load: Load, times_s: Sequence[float]) -> Iterator[float]:
    """Endless send times: those of a trace, scaled so that their mean rate is that of `load`, over and over.

    Each round begins one mean gap after the last request of the one before. Raises `InvalidValueError` for a closed
    loop, and for a trace without time between its requests.
    """
    rate = load.request_rate
    if rate is None or len(times_s) < 2 or times_s[-1] <= times_s[0]:
        raise InvalidValueError(f"{load} cannot follow a trace of {len(times_s)} requests; it takes a rate and a span")
    first_s, span_s = times_s[0], times_s[-1] - times_s[0]
    scale = (len(times_s) - 1) / (rate * span_s)
    round_s = span_s * scale + 1.0 / rate
    return (rounds * round_s + (at - first_s) * scale for rounds in count() for at in times_s)
