"""Prices of nodes, and what a study may cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import TEXT, Invoke, commands_in
from tuner.study_errors import StudyFileError
from tuner.study_file import parse_study
from tuner.wiring import make_budget, make_problem

PRICES = "price_per_hour: 4.0, spot_price_per_hour: 1.0, reserved_price_per_hour: 2.0"
PRICED = TEXT.replace("price_per_hour: 1.0", PRICES)


@pytest.mark.parametrize(("pricing", "price"), [("on_demand", 4.0), ("spot", 1.0), ("reserved", 2.0)])
def test_the_chosen_price_counts(pricing: str, price: float) -> None:
    study = parse_study(PRICED, [f"node_pools.local.pricing={pricing}"])
    assert make_problem(study).node_pools[0].price_per_hour == price


def test_prices_that_are_missing_are_told() -> None:
    with pytest.raises(StudyFileError, match=r"pricing.*: spot needs spot_price_per_hour; give it too"):
        parse_study(TEXT, ["node_pools.local.pricing=spot"])
    free = TEXT.replace(", price_per_hour: 1.0", "")
    with pytest.raises(StudyFileError, match=r"0 leaves cost_per_million_tokens undefined"):
        parse_study(free, ["objectives=[cost_per_million_tokens, ttft_p50_ms]"])
    with pytest.raises(StudyFileError, match=r"0 leaves budget\.cost undefined"):
        parse_study(free, ["budget.cost=3"])
    assert make_budget(parse_study(TEXT, ["budget.cost=3", "budget.device_hours=2"])).dollars == 3


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    return commands_in(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(("limit", "said"), [("cost=0.01", "money"), ("device_hours=0.04", "device-hours")])
def test_a_study_ends_when_its_money_or_its_device_hours_are_used(invoke: Invoke, limit: str, said: str) -> None:
    run = invoke("study", "run", "study.yaml", "--set", "budget.trials=200", "--set", f"budget.{limit}")
    assert run.code == 0
    assert f"the budget of {said} is used" in run.err
    found = json.loads(invoke("study", "show", "toy", "--json").out)
    assert 1 < found["counts"]["measured"] < 200
    used = found["spent"]["dollars" if said == "money" else "device_hours"]
    limit_value = float(limit.partition("=")[2])
    dearest = max(
        sum(t["timings_s"].values()) * t["configuration"]["devices"] / 3600 for t in found["trials"] if t["timings_s"]
    )
    assert limit_value <= used <= limit_value + dearest
    assert "device-hours, $" in invoke("study", "show", "toy").out
