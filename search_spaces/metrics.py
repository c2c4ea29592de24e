"""What a measurement or a prediction says of a deployment under load.

Terms: TTFT = first token - send. TPOT = (E2E - TTFT) / (OSL - 1) of a request. ITL = each raw gap between tokens.
E2E = last token - send. Goodput = requests/s that meet *every* SLO of the study.
On a CPU pool "per GPU" means per reserved core: the device of that pool.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from search_spaces.errors import InvalidValueError

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
LATENCIES = ("ttft", "tpot", "itl", "e2e")
_PERCENTILE = re.compile(r"p([1-9]\d|99\d{1,2})")


class Direction(StrEnum):
    """Which way is better."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """Unit, better direction and meaning of a named metric."""

    unit: str
    direction: Direction
    meaning: str


def _latency_metrics() -> dict[str, MetricInfo]:
    return {
        f"{latency}_{statistic}_ms": MetricInfo(
            unit="ms", direction=Direction.MINIMIZE, meaning=f"{statistic} of {latency.upper()}"
        )
        for latency in LATENCIES
        for statistic in STATISTICS
    }


def _up(unit: str, meaning: str) -> MetricInfo:
    return MetricInfo(unit=unit, direction=Direction.MAXIMIZE, meaning=meaning)


def _down(unit: str, meaning: str) -> MetricInfo:
    return MetricInfo(unit=unit, direction=Direction.MINIMIZE, meaning=meaning)


class _Metrics(dict[str, MetricInfo]):
    """The metrics that every measurement has; percentiles beside those in `STATISTICS` are known when asked for."""

    def __missing__(self, name: str) -> MetricInfo:
        """The metric of another percentile; `KeyError` for what is none."""
        latency, _, rest = name.partition("_")
        statistic = rest.removesuffix("_ms")
        if latency not in LATENCIES or rest == statistic or percentile_level(statistic) is None:
            raise KeyError(name)
        meaning = f"{statistic} of {latency.upper()}, measured where an SLO asks for it"
        return MetricInfo(unit="ms", direction=Direction.MINIMIZE, meaning=meaning)


METRICS: dict[str, MetricInfo] = _Metrics(
    **_latency_metrics(),
    output_tokens_per_s=_up("tokens/s", "output tokens per second of the whole deployment"),
    output_tokens_per_s_per_gpu=_up("tokens/s/GPU", "output tokens per second and reserved device"),
    output_tokens_per_s_per_user=_up("tokens/s/user", "1000 / mean TPOT: what one user sees"),
    output_tokens_per_dollar=_up("tokens/$", "output tokens per dollar of reserved devices"),
    total_tokens_per_s=_up("tokens/s", "prompt and output tokens per second of the whole deployment"),
    input_tokens_per_s=_up("tokens/s", "prompt tokens per second of the whole deployment"),
    requests_per_s=_up("requests/s", "completed requests per second"),
    goodput_rps=_up("requests/s", "requests per second that meet every SLO"),
    goodput_rps_per_gpu=_up("requests/s/GPU", "goodput per reserved device"),
    goodput_requests_per_dollar=_up("requests/$", "requests that meet every SLO per dollar"),
    cost_per_million_output_tokens=_down("$", "dollars of reserved devices per million output tokens"),
    requests_per_dollar=_up("requests/$", "completed requests per dollar of reserved devices"),
    cost_per_million_tokens=_down("$", "dollars of reserved devices per million prompt and output tokens"),
    price_per_hour=_down("$/h", "price of the reserved devices"),
    power_w=_down("W", "mean electric power of the reserved GPUs while measured, where they report it"),
    output_tokens_per_joule=_up("tokens/J", "output tokens per second and watt of the reserved GPUs"),
    devices=_down("devices", "devices reserved (GPUs, or cores on a CPU pool)"),
    error_rate=_down("1", "share of measured requests that failed"),
)


POWER_METRICS = ("power_w", "output_tokens_per_joule")
"""Only known where the power of the devices can be read."""


def metric_info(name: str) -> MetricInfo:
    """Information on metric `name`; raises `InvalidValueError` that lists the nearest names."""
    try:
        return METRICS[name]
    except KeyError as error:
        from difflib import get_close_matches

        near = get_close_matches(name, METRICS, n=3) or list(METRICS)[:5]
        raise InvalidValueError(f"metric {name!r} is unknown; did you mean {', '.join(near)}?") from error


def percentile_level(statistic: str) -> float | None:
    """The share of requests that a statistic such as p75, p99 or p999 (99.9%) stands for; None for no percentile."""
    found = _PERCENTILE.fullmatch(statistic)
    return float(f"0.{found[1]}") if found else None


def other_percentiles(metrics: Iterable[str]) -> tuple[str, ...]:
    """Percentiles that `metrics` name beside those of every measurement, such as p75."""
    named = (name.split("_")[1] for name in metrics if name.split("_")[0] in LATENCIES)
    return tuple(dict.fromkeys(name for name in named if name not in STATISTICS))


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Mean and percentiles of a latency, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class ServingMetrics:
    """Figures of one deployment under one load.

    `devices` and `price_per_hour` are those of the deployment's reserved devices, `power_w` their mean electric power
    where it could be read. `requests` counts the measured requests that completed, `errors` those that failed; both
    leave the warm-up out. `duration_s` is the measured window. `percentiles_ms` holds the percentiles that an SLO asked
    for beside the usual ones, by name of metric.
    """

    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles
    e2e_ms: Percentiles
    output_tokens_per_s: float
    input_tokens_per_s: float
    requests_per_s: float
    goodput_rps: float
    requests: int
    errors: int
    duration_s: float
    devices: int
    price_per_hour: float
    power_w: float | None = None
    percentiles_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def error_rate(self) -> float:
        """Share of measured requests that failed."""
        total = self.requests + self.errors
        return self.errors / total if total else 1.0

    def flat(self) -> dict[str, float]:
        """Every metric of `METRICS` that is defined here, by name.

        Figures per dollar are left out where the devices have no price, those of power where none was read.
        """
        values = {
            f"{latency}_{statistic}_ms": getattr(getattr(self, f"{latency}_ms"), statistic)
            for latency in LATENCIES
            for statistic in STATISTICS
        }
        values |= {
            "output_tokens_per_s": self.output_tokens_per_s,
            "output_tokens_per_s_per_gpu": self.output_tokens_per_s / self.devices,
            "output_tokens_per_s_per_user": 1000.0 / self.tpot_ms.mean,
            "total_tokens_per_s": self.input_tokens_per_s + self.output_tokens_per_s,
            "input_tokens_per_s": self.input_tokens_per_s,
            "requests_per_s": self.requests_per_s,
            "goodput_rps": self.goodput_rps,
            "goodput_rps_per_gpu": self.goodput_rps / self.devices,
            "price_per_hour": self.price_per_hour,
            "devices": float(self.devices),
            "error_rate": self.error_rate,
        }
        return values | self._per_dollar() | self._per_watt() | dict(self.percentiles_ms)

    def _per_watt(self) -> dict[str, float]:
        if self.power_w is None or self.power_w <= 0:
            return {}
        return {"power_w": self.power_w, "output_tokens_per_joule": self.output_tokens_per_s / self.power_w}

    def _per_dollar(self) -> dict[str, float]:
        if self.price_per_hour <= 0 or self.output_tokens_per_s <= 0:
            return {}
        dollars_per_s = self.price_per_hour / 3600
        return {
            "output_tokens_per_dollar": self.output_tokens_per_s / dollars_per_s,
            "goodput_requests_per_dollar": self.goodput_rps / dollars_per_s,
            "requests_per_dollar": self.requests_per_s / dollars_per_s,
            "cost_per_million_tokens": 1e6 * dollars_per_s / (self.input_tokens_per_s + self.output_tokens_per_s),
            "cost_per_million_output_tokens": 1e6 * dollars_per_s / self.output_tokens_per_s,
        }
