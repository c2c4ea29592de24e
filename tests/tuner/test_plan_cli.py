"""`tuner plan` on studies: offers from trials, how replicas scale, what is printed and how it exits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.errors import InvalidValueError
from search_spaces.serving import Candidate, Mode
from search_spaces.slos import Slo
from search_spaces.workload import Arrival, Load
from studies.records import TrialRecord, TrialStatus
from tests.studies.toy import measure, toy_problem, wide_space
from tests.support.commands import Invoke, commands_in
from tests.support.reports import some_candidates, trial
from tuner.plan_cli import parse_rate
from tuner.plan_units import in_flight, measured_offers, nearest_miss, scaling

PROBLEM = toy_problem()
SPACE = wide_space(PROBLEM)


def with_rate(number: int, candidate: Candidate, rate: float) -> TrialRecord:
    measurement = measure(candidate)
    metrics = replace(measurement.metrics, requests_per_s=rate)
    return replace(trial(number, candidate, PROBLEM), outcome=replace(measurement, metrics=metrics), key=candidate.key)


def times(candidate: Candidate, replicas: int, load: float) -> Candidate:
    pools = tuple(replace(pool, replicas=replicas * pool.replicas) for pool in candidate.config.pools)
    load_then = replace(candidate.load, value=load)
    return replace(candidate, config=replace(candidate.config, pools=pools), load=load_then)


def test_offers_are_the_measured_configurations_that_meet_the_slos() -> None:
    trials = [trial(index, candidate, PROBLEM) for index, candidate in enumerate(some_candidates(SPACE)[:6])]
    figures = [t.measurement.metrics.flat()["ttft_p99_ms"] for t in trials if t.measurement]
    limit = sorted(figures)[2]
    offers = measured_offers(trials, (Slo(metric="ttft_p99_ms", threshold=limit),))
    assert {int(offer.unit.name) for offer in offers} == {i for i, value in enumerate(figures) if value <= limit}
    for offer in offers:
        config = offer.candidate.config
        assert offer.unit.devices == config.devices
        assert sum(len(sizes) for sizes in offer.unit.sizes.values()) == sum(pool.replicas for pool in config.pools)
        assert offer.unit.users == offer.candidate.load.value
    miss = nearest_miss(trials, (Slo(metric="ttft_p99_ms", threshold=min(figures) / 2),))
    assert miss is not None
    assert miss[0].number == figures.index(min(figures))
    assert miss[1] == {"ttft_p99_ms": pytest.approx(1.0)}


def test_two_pools_on_one_node_pool_are_packed_together() -> None:
    candidate = SPACE.default(Mode.DISAGGREGATED)
    (offer,) = measured_offers([trial(0, candidate, PROBLEM)], ())
    (sizes,) = offer.unit.sizes.values()
    assert len(sizes) == 2


def test_users_of_an_open_loop_follow_littles_law() -> None:
    assert in_flight(Load(arrival=Arrival.POISSON, value=3), {"requests_per_s": 4.0, "e2e_mean_ms": 500.0}) == 2.0
    assert in_flight(Load(arrival=Arrival.CLOSED, value=7), {}) == 7


def test_scaling_is_read_from_configurations_that_differ_in_replicas_alone() -> None:
    one = times(SPACE.default(Mode.AGGREGATED), 1, 2.0)
    assert (scaling([with_rate(0, one, 10.0)]).efficiency, scaling([with_rate(0, one, 10.0)]).pairs) == (1.0, 0)
    two, four = times(one, 2, 4.0), times(one, 4, 8.0)
    trials = [with_rate(0, one, 10.0), with_rate(1, two, 18.0), with_rate(2, four, 32.0)]
    found = scaling(trials)
    assert found.pairs == 3
    assert found.efficiency == pytest.approx(32.0 / 36.0), "the median of 0.9, 0.8 and 32/36"
    other_load = with_rate(3, times(one, 2, 2.0), 1.0)
    assert scaling([*trials, other_load]) == found, "half the load on each replica says nothing of scaling"
    faster = [with_rate(0, one, 10.0), with_rate(1, two, 30.0)]
    assert scaling(faster).efficiency == 1.0
    failed = replace(trials[1], status=TrialStatus.FAILED, outcome=None)
    assert scaling([trials[0], failed]).pairs == 0


@pytest.mark.parametrize(
    ("text", "rate"), [("120/s", 120), ("120", 120), ("7200/min", 120), ("3.6e3/h", 1), (" 0.5 / s ", 0.5)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "fast", "3/day", "-3/s", "1..2"])
def test_bad_rates_are_told(text: str) -> None:
    with pytest.raises(InvalidValueError, match="is no rate; write such as 120/s"):
        parse_rate(text)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    return commands_in(tmp_path, monkeypatch, capsys)


def test_the_command_plans_says_what_it_assumes_and_what_cannot_be(invoke: Invoke) -> None:
    assert invoke("study", "run", "study.yaml", "--set", "budget.confirm=1").code == 0
    done = invoke("plan", "toy", "--rate", "100/s", "--headroom", "0.1", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["met"]
    assert found["rate"] >= 110
    assert found["cost_per_hour"] == pytest.approx(found["nodes"]["local"] * 1.0)
    assert found["nodes"]["local"] * 4 >= found["devices"]
    assert sum(part["copies"] * part["rate"] for part in found["parts"]) == pytest.approx(found["rate"])
    assert found["latencies_at_most"]["ttft_p99_ms"] <= 60
    text = invoke("plan", "toy", "--rate", "100/s", "--headroom", "0.1").out
    assert "Plan of toy for 100 requests/s, 10% headroom" in text
    assert "copies scale linearly; the study measured no" in text
    assert "nodes are rented whole" in text
    cannot_be_met_exits_with_1_and_says_the_nearest(invoke)
    slos_that_nothing_meets_and_other_mistakes_are_told(invoke)


def cannot_be_met_exits_with_1_and_says_the_nearest(invoke: Invoke) -> None:
    done = invoke("plan", "toy", "--users", "100000", "--pool", "local=3")
    assert done.code == 1
    assert "CANNOT BE MET, this is the nearest that can be" in done.out
    assert "3 x local" in done.out
    assert "short of the demand" in done.out
    most = json.loads(invoke("plan", "toy", "--gpus", "8", "--json").out)
    assert (most["met"], most["devices"] <= 8, most["served_share"]) == (True, True, None)


def slos_that_nothing_meets_and_other_mistakes_are_told(invoke: Invoke) -> None:
    for args, part in (
        (("--rate", "1/s", "--slo", "ttft_p99_ms=0.001"), "nearest is trial"),
        (("--rate", "fast"), "is no rate"),
        ((), "nothing is demanded"),
        (("--rate", "1", "--pool", "h100"), "'h100' is no node pool; choose local"),
        (("--rate", "1", "--pool", "local=many"), "'many' is no number of nodes"),
        (("--rate", "1", "--pricing", "spot"), "no spot_price_per_hour"),
    ):
        done = invoke("plan", "toy", *args)
        assert (done.code, part in done.err) == (2, True), done.err


def test_predicted_parts_are_marked(invoke: Invoke) -> None:
    assert invoke("study", "run", "study.yaml", "--set", "budget.confirm=1", "--set", "budget.trials=3").code == 0
    done = invoke("plan", "toy", "--rate", "1000/s", "--predicted", "200", "--slo", "ttft_p99_ms=none", "--json")
    found = json.loads(done.out)
    parts = [part for part in found["parts"] if part["predicted"]]
    assert all(part["trial"] is None and part["runs"] == 0 for part in parts)
    marked = any(line.startswith("PREDICTED parts") for line in found["assumptions"])
    assert marked == bool(parts)
    measured = json.loads(invoke("plan", "toy", "--rate", "1000/s", "--slo", "ttft_p99_ms=none", "--json").out)
    assert found["cost_per_hour"] <= measured["cost_per_hour"]
