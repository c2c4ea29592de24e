"""From what users of a deployment see to named metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perf_model.latency import QUANTILES, Distribution
from perf_model.numeric import FloatArray
from perf_model.serving import ServingEstimate
from search_spaces.metrics import other_percentiles, percentile_level
from search_spaces.problem import Slo


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Size, price and rated power of each configuration's deployment, and the requests it serves; arrays."""

    requests_per_s: FloatArray
    devices: FloatArray
    price_per_hour: FloatArray
    rated_power_w: FloatArray
    isl: FloatArray
    osl: FloatArray


def metrics(estimate: ServingEstimate, deployment: Deployment, slos: Sequence[Slo]) -> dict[str, FloatArray]:
    """Every metric of `search_spaces.metrics.METRICS`; those per dollar are NaN where devices have no price.

    Power is taken for the rated one, which a loaded GPU comes near to; NaN where none is known.
    """
    tokens_per_s = deployment.requests_per_s * deployment.osl
    prompt_tokens_per_s = deployment.requests_per_s * deployment.isl
    goodput = deployment.requests_per_s * attainment(estimate, deployment, slos)
    dollars_per_s = np.where(deployment.price_per_hour > 0, deployment.price_per_hour / 3600.0, np.nan)
    return {
        **latencies(estimate, deployment, other_percentiles(slo.metric for slo in slos)),
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_gpu": tokens_per_s / deployment.devices,
        "output_tokens_per_s_per_user": 1000.0 / estimate.tpot.mean(),
        "output_tokens_per_dollar": tokens_per_s / dollars_per_s,
        "total_tokens_per_s": tokens_per_s + prompt_tokens_per_s,
        "input_tokens_per_s": prompt_tokens_per_s,
        "requests_per_s": deployment.requests_per_s,
        "goodput_rps": goodput,
        "goodput_rps_per_gpu": goodput / deployment.devices,
        "goodput_requests_per_dollar": goodput / dollars_per_s,
        "requests_per_dollar": deployment.requests_per_s / dollars_per_s,
        "cost_per_million_tokens": 1e6 * dollars_per_s / (tokens_per_s + prompt_tokens_per_s),
        "cost_per_million_output_tokens": 1e6 * dollars_per_s / tokens_per_s,
        "price_per_hour": deployment.price_per_hour,
        "power_w": deployment.rated_power_w,
        "output_tokens_per_joule": tokens_per_s / deployment.rated_power_w,
        "devices": deployment.devices,
        "error_rate": np.zeros_like(deployment.devices),
    }


def latencies(estimate: ServingEstimate, deployment: Deployment, others: Sequence[str] = ()) -> dict[str, FloatArray]:
    """Mean and percentiles of TTFT, TPOT, ITL and E2E, `others` among them; those of E2E add those of its parts."""
    quantiles = QUANTILES | {name: level for name in others if (level := percentile_level(name)) is not None}
    named: dict[str, Distribution] = {"ttft": estimate.ttft, "tpot": estimate.tpot, "itl": estimate.itl}
    result = {f"{name}_mean_ms": distribution.mean() for name, distribution in named.items()}
    for label, level in quantiles.items():
        result |= {f"{name}_{label}_ms": distribution.quantile(level) for name, distribution in named.items()}
    gaps = np.maximum(deployment.osl - 1.0, 1.0)
    for label in ("mean", *quantiles):
        result[f"e2e_{label}_ms"] = result[f"ttft_{label}_ms"] + gaps * result[f"tpot_{label}_ms"]
    return result


def attainment(estimate: ServingEstimate, deployment: Deployment, slos: Sequence[Slo]) -> FloatArray:
    """Share of requests that meet every latency SLO.

    An SLO on any statistic of a latency is held against each request, as in the measurement. The least of the shares
    stands for the joint share, since a request that is late in one figure tends to be late in the others; other metrics
    than latencies do not concern a request.
    """
    share = np.ones_like(deployment.devices)
    gaps = np.maximum(deployment.osl - 1.0, 1.0)
    for slo in slos:
        latency = slo.metric.split("_")[0]
        if latency == "e2e":
            within = estimate.ttft.share_within(slo.threshold - gaps * estimate.tpot.mean())
        elif latency in {"ttft", "tpot"}:
            within = (estimate.ttft if latency == "ttft" else estimate.tpot).share_within(slo.threshold)
        else:
            continue
        share = np.minimum(share, within)
    return share
