"""`tuner whatif`: the corrected model answers for what was not measured, and says where it only guesses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_spaces.errors import InvalidValueError
from search_spaces.outcome import Prediction
from search_spaces.serving import Mode, Role
from search_spaces.slos import Slo
from search_spaces.workload import Arrival, Load
from tests.studies.toy import measure, toy_problem, wide_space
from tests.support.commands import Invoke, commands_in, stored_rows
from tests.support.reports import trial
from tuner.whatif import beyond, chance, changed, interval_90, split

SPACE = wide_space(toy_problem())
SPLIT = SPACE.default(Mode.DISAGGREGATED)


def test_settings_change_the_named_pool_alone() -> None:
    own, of_file = split(["decode.max_num_seqs=8", "decode.replicas=2", "load=3", "workload.isl=9"])
    assert (own, of_file) == ({"decode.max_num_seqs": 8, "decode.replicas": 2, "load": 3}, ["workload.isl=9"])
    found = changed(SPLIT, own).config
    assert found.pool(Role.PREFILL) == SPLIT.config.pool(Role.PREFILL)
    assert (found.pool(Role.DECODE).option("max_num_seqs"), found.pool(Role.DECODE).replicas) == (8, 2)


def test_cores_of_a_replica_follow_its_threads() -> None:
    assert changed(SPLIT, {"prefill.threads": 4}).config.pool(Role.PREFILL).devices_per_rank == 4


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("mixed.replicas=2", "has no mixed pool, but prefill, decode"),
        ("decode.speed=2", "the pool has no speed; it has node_pool, replicas"),
        ("decode.max_num_seqs=many", "outside the limits of llamacpp"),
        ("decode.tp=1.5", "whole number"),
        ("decode.tp=[1, 2]", "no single value"),
        ("mode=aggregated", "--trial NUMBER"),
        ("decode.tp", "sets nothing"),
    ],
)
def test_a_setting_that_is_none_is_told(setting: str, part: str) -> None:
    with pytest.raises(InvalidValueError, match=part.replace("[", r"\[")):
        changed(SPLIT, split([setting])[0])


def test_the_chance_of_an_slo_is_that_of_a_normal_logarithm() -> None:
    said = Prediction(metrics={"ttft_p50_ms": 100.0, "requests_per_s": 100.0}, log_stddev={"ttft_p50_ms": 0.2})
    assert chance(said, Slo(metric="ttft_p50_ms", threshold=100)) == pytest.approx(0.5)
    assert chance(said, Slo(metric="ttft_p50_ms", threshold=100 * math.exp(0.2))) == pytest.approx(0.8413, abs=1e-4)
    assert chance(said, Slo(metric="requests_per_s", threshold=90)) == 1.0, "without a spread it is certain"
    spread = replace(said, log_stddev={"requests_per_s": 0.2})
    assert chance(spread, Slo(metric="requests_per_s", threshold=100 * math.exp(0.2))) == pytest.approx(
        0.1587, abs=1e-4
    )
    low, high = interval_90(said, "ttft_p50_ms") or (0, 0)
    assert (low * high, high / 100) == (pytest.approx(1e4), pytest.approx(math.exp(1.6449 * 0.2)))


def test_what_lies_outside_the_measured_range_is_named_and_nothing_else() -> None:
    problem = SPACE.problem
    low = replace(changed(SPLIT, {"decode.max_num_seqs": 2}), load=Load(arrival=Arrival.CLOSED, value=2))
    high = replace(changed(SPLIT, {"decode.max_num_seqs": 8}), load=Load(arrival=Arrival.CLOSED, value=8))
    trials = [trial(i, candidate, problem) for i, candidate in enumerate((low, high))]
    assert measure(low).metrics.devices == low.config.devices
    between = replace(changed(SPLIT, {"decode.max_num_seqs": 4}), load=Load(arrival=Arrival.CLOSED, value=4))
    assert beyond(between, trials, problem, problem) == ()
    other = changed(between, {"prefill.max_num_seqs": 1, "decode.replicas": 3})
    device = replace(problem.node_pools[0].device, name="another")
    moved = replace(problem, node_pools=(replace(problem.node_pools[0], device=device),))
    same = SPLIT.config.pool(Role.PREFILL).option("max_num_seqs")
    assert beyond(replace(other, load=Load(arrival=Arrival.CLOSED, value=9)), trials, problem, moved) == (
        "concurrency=9: measured were 2 to 8",
        "prefill on another: no prefill replica was measured on such a device",
        f"prefill.max_num_seqs=1: measured were {same}",
        "decode on another: no decode replica was measured on such a device",
        "decode.replicas=3: measured were 1",
    )


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    return commands_in(tmp_path, monkeypatch, capsys)


def asked(invoke: Invoke, *settings: str) -> dict[str, Any]:
    done = invoke("whatif", "toy", *(word for text in settings for word in ("--set", text)), "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def width(answer: dict[str, Any]) -> float:
    low, high = answer["intervals_90"]["ttft_p50_ms"]
    return math.log(high / low)


def test_the_command_answers_without_measuring_or_writing(invoke: Invoke) -> None:
    assert invoke("study", "run", "study.yaml").code == 0
    before = stored_rows()
    same = asked(invoke)
    trial_number, [answer] = same["from"]["trial"], same["answers"]
    assert answer["measured_as_trial"] == trial_number
    assert answer["metrics"] == same["from"]["predicted"]["metrics"]
    low, high = answer["intervals_90"]["output_tokens_per_s"]
    assert low < same["from"]["measured"]["output_tokens_per_s"] < high, "the model was corrected by this very trial"
    [other] = asked(invoke, "workload.isl=640")["answers"]
    assert other["metrics"]["ttft_p50_ms"] > answer["metrics"]["ttft_p50_ms"]
    assert width(other) > width(answer), "of other users nothing was measured"
    assert other["extrapolated"] == ["workload.isl.mean: 64 -> 640: the study measured nothing there"]
    loads = asked(invoke, "workload.concurrency=[2, 8]")["answers"]
    assert [found["configuration"]["concurrency"] for found in loads] == [2, 8]
    assert any("concurrency=8" in text for text in loads[1]["extrapolated"])
    assert "cannot place them" in asked(invoke, "prefill.replicas=64")["answers"][0]["infeasible"]
    shown = invoke("whatif", "toy", "--set", "load=64").out
    assert "PREDICTED by the model, nothing was measured: toy" in shown
    assert "EXTRAPOLATED, beyond what the study measured:\n    concurrency=64" in shown
    assert "ttft_p99_ms at most 60: met with probability" in shown
    unknown = invoke("whatif", "toy", "--set", "prefill.node_pool=there")
    assert (unknown.code, "node pool 'there' is unknown; choose local" in unknown.err) == (2, True)
    assert stored_rows() == before
