"""When requests are sent in an open loop: on schedule, whatever the server does."""

from __future__ import annotations

from collections.abc import Iterator
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
    if load.arrival is Arrival.CONSTANT:
        return (index / rate for index in count())
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ARRIVAL_STREAM,)))
    gaps = (float(generator.exponential(mean)) for mean in repeat(1.0 / rate))
    return accumulate(gaps, initial=0.0)
