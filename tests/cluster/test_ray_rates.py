"""The highest rate of a real deployment: one start, several rates, an interval, every run recorded."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engines.llamacpp import LlamaCppBackend
from cluster.ray_runner import RayTrialRunner
from cluster.ray_session import RayCluster
from cluster.runner import Running
from search_spaces.measuring import MeasurementRule
from search_spaces.outcome import Measurement
from search_spaces.problem import Slo
from search_spaces.workload import Arrival, Length, Load, RateSearch, Workload
from studies.codec import from_json, to_json
from tests.support.ray_problem import PROBLEM, aggregated, request

pytestmark = [pytest.mark.ray, pytest.mark.engine]

SEARCH = RateSearch(lowest=0.5, highest=256.0, tolerance=0.5)
RATED = replace(
    PROBLEM,
    workload=Workload(isl=Length(mean=48), osl=Length(mean=12), arrival=Arrival.CONSTANT, rate_search=SEARCH),
    slos=(Slo(metric="ttft_p95_ms", threshold=400),),
)


@pytest.mark.long
def test_the_highest_rate_of_an_engine_is_found_on_one_deployment(ray_cluster: RayCluster, tmp_path: Path) -> None:
    rule = MeasurementRule(requests=16, lateness_limit_ms=5000.0)
    config = aggregated(max_num_seqs=1)
    asked = request("r0", config, tmp_path, problem=RATED, rule=rule)
    load = Load(arrival=Arrival.CONSTANT, value=SEARCH.highest)
    asked = replace(asked, candidate=replace(asked.candidate, load=load), first_rate=8.0)
    backends = {"llamacpp": LlamaCppBackend()}
    study = f"rates-{os.getpid()}"
    with RayTrialRunner(study=study, backends=backends, cluster=ray_cluster, work_dir=tmp_path / "d") as runner:
        handle = runner.start(asked)
        deadline_s = time.monotonic() + 120
        while isinstance(outcome := runner.poll(handle), Running):
            assert time.monotonic() < deadline_s, outcome
            time.sleep(0.05)
        assert runner.warm() == (config,)
    assert isinstance(outcome, Measurement), outcome
    met, missed = outcome.highest_rate
    rates = [probe.request_rate for probe in outcome.probes]
    assert rates[0] == 8.0
    assert len(rates) >= 2
    assert met is not None, outcome.probes
    if missed is None:
        assert met == SEARCH.highest
    else:
        assert met < missed <= met * 1.5 * 1.001
    best = next(probe for probe in outcome.probes if probe.request_rate == met)
    assert best.metrics == outcome.metrics
    assert outcome.metrics.ttft_ms.p95 <= 400
    assert outcome.metrics.goodput_rps > 0
    assert all(probe.metrics is not None or probe.detail for probe in outcome.probes)
    assert Path(outcome.artifacts["request_timings"]).is_file()
    assert from_json(Measurement, to_json(outcome)) == outcome, "every run is stored with the trial"
