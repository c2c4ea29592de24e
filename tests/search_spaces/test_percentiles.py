"""SLOs at any percentile: named, measured where asked for, predicted, and averaged over runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.load.summary import summarise
from cluster.load.timings import Phase, RequestTiming
from search_spaces.errors import InvalidValueError
from search_spaces.metrics import METRICS, Direction, metric_info, other_percentiles, percentile_level
from search_spaces.slos import Slo
from studies.codec import from_json, to_json
from studies.repeats import mean_metrics
from tests.studies.toy import measure, toy_problem, wide_space
from tuner.prediction import look_out
from tuner.study_errors import StudyFileError
from tuner.study_file import parse_study

GPU = """
name: g
model: {name: Llama-3.1-8B}
workload: {isl: 256, osl: 64, concurrency: 8}
objectives: [output_tokens_per_s, ttft_p50_ms]
slos: {ttft_p75_ms: 5000, e2e_p999_ms: 90000}
node_pools: {h100: {device: h100_sxm, gpus_per_node: 8}}
engines: {vllm: {quantization: none}}
space: {modes: aggregated}
"""


@pytest.mark.parametrize(("statistic", "level"), [("p75", 0.75), ("p10", 0.1), ("p999", 0.999), ("p995", 0.995)])
def test_names_of_percentiles(statistic: str, level: float) -> None:
    assert percentile_level(statistic) == pytest.approx(level)
    info = metric_info(f"tpot_{statistic}_ms")
    assert (info.unit, info.direction) == ("ms", Direction.MINIMIZE)
    assert f"tpot_{statistic}_ms" not in METRICS, "the list of metrics is that of every measurement"


@pytest.mark.parametrize("name", ["ttft_p9_ms", "ttft_p05_ms", "ttft_p100_ms", "ttft_p75", "loss_p75_ms"])
def test_what_is_no_percentile_is_told(name: str) -> None:
    with pytest.raises(InvalidValueError, match="is unknown; did you mean"):
        metric_info(name)


def test_only_what_is_not_measured_anyway_is_asked_for() -> None:
    names = ["ttft_p75_ms", "ttft_p99_ms", "e2e_p75_ms", "goodput_rps", "itl_mean_ms", "tpot_p999_ms"]
    asked = other_percentiles(names)
    assert asked == ("p75", "p999")


def timing(index: int) -> RequestTiming:
    """A request whose TTFT is index + 1 ms and whose gaps are a tenth of that."""
    sent = index * 1_000_000_000
    first = sent + (index + 1) * 1_000_000
    tokens = tuple(first + step * (index + 1) * 100_000 for step in range(4))
    return RequestTiming(
        index=index,
        phase=Phase.MEASURED,
        scheduled_ns=sent,
        sent_ns=sent,
        connect_ns=0,
        token_ns=tokens,
        end_ns=tokens[-1],
        input_tokens=8,
        planned_tokens=4,
        output_tokens=4,
    )


def test_an_slo_has_its_percentile_measured() -> None:
    slos = (Slo(metric="ttft_p75_ms", threshold=1), Slo(metric="itl_p999_ms", threshold=1, hard=False))
    timings = [timing(index) for index in range(20)]
    found = summarise(timings, slos=slos, devices=1, price_per_hour=0).flat()
    assert found["ttft_p75_ms"] == pytest.approx(np.percentile(range(1, 21), 75))
    gaps = [(index + 1) * 0.1 for index in range(20) for _ in range(3)]
    assert found["itl_p999_ms"] == pytest.approx(np.percentile(gaps, 99.9))
    assert "ttft_p75_ms" not in summarise(timings, slos=(), devices=1, price_per_hour=0).flat()


def test_it_is_stored_and_averaged_over_runs() -> None:
    metrics = measure(wide_space(toy_problem()).default()).metrics
    one, two = (replace(metrics, percentiles_ms={"ttft_p75_ms": value}) for value in (10.0, 30.0))
    assert from_json(type(one), to_json(one)) == one
    assert mean_metrics([one, two]).flat()["ttft_p75_ms"] == 20.0
    assert "ttft_p75_ms" not in mean_metrics([one, metrics]).flat()


@pytest.mark.parametrize("calibration", ["none", "shipped"])
def test_it_is_predicted(calibration: str) -> None:
    found = look_out(parse_study(GPU, [f"calibration={calibration}"]), top=0).defaults[0].prediction.metrics
    assert found["ttft_p50_ms"] <= found["ttft_p75_ms"] <= found["ttft_p90_ms"]
    assert found["e2e_p999_ms"] >= found["e2e_p99_ms"]


def test_an_objective_is_one_that_every_measurement_has() -> None:
    with pytest.raises(StudyFileError, match="is no objective; choose p50, p99"):
        parse_study(GPU, ["objectives=[ttft_p75_ms, output_tokens_per_s]"])
