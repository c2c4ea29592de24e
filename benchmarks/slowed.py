"""What emulated engines show: what the model says, with latencies that are longer by hidden factors."""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.metrics import LATENCIES, STATISTICS, Percentiles, ServingMetrics


def slowed(said: Mapping[str, float], factors: Mapping[str, float], *, requests: int, devices: int) -> ServingMetrics:
    """The metrics of a run of `requests` on `devices` of which the model says `said`, each latency times its factor.

    `factors` are by latency; rates fall as the end-to-end latency grows.
    """
    whole = factors["e2e"]
    rate = said["requests_per_s"] / whole
    return ServingMetrics(
        **{f"{latency}_ms": _percentiles(said, latency, factors[latency]) for latency in LATENCIES},
        output_tokens_per_s=said["output_tokens_per_s"] / whole,
        input_tokens_per_s=said["input_tokens_per_s"] / whole,
        requests_per_s=rate,
        goodput_rps=said["goodput_rps"] / whole,
        requests=requests,
        errors=0,
        duration_s=requests / rate,
        devices=devices,
        price_per_hour=said["price_per_hour"],
    )


def _percentiles(said: Mapping[str, float], latency: str, factor: float) -> Percentiles:
    return Percentiles(**{name: said[f"{latency}_{name}_ms"] * factor for name in STATISTICS})
