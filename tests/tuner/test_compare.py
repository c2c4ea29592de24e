"""Studies held against each other: figures by hand, what is noise, and the command on real storages."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.errors import InvalidValueError
from search_spaces.serving import Candidate
from search_spaces.slos import Slo
from studies.noise import quantile
from studies.records import Origin, TrialRecord
from tests.studies.toy import measure, toy_problem, wide_space
from tests.support.commands import Invoke, commands_in, stored_rows
from tests.support.reports import some_candidates, trial
from tuner.comparison import Comparison, Spread, compare, exceeds_noise
from tuner.report import StudyReport

PROBLEM = toy_problem()
CANDIDATES = some_candidates(wide_space(PROBLEM))
OBJECTIVES = ("output_tokens_per_s", "ttft_p50_ms")


def record(index: int, candidate: Candidate, tokens: float, ttft: float, *, of: int | None = None) -> TrialRecord:
    made = trial(index, candidate, PROBLEM)
    measurement = measure(candidate)
    latencies = replace(measurement.metrics.ttft_ms, p50=ttft)
    metrics = replace(measurement.metrics, output_tokens_per_s=tokens, ttft_ms=latencies)
    origin = Origin.SCREENED if of is None else Origin.CONFIRM
    return replace(
        made,
        outcome=replace(measurement, metrics=metrics),
        values=(tokens, ttft),
        repeat_of=of,
        origin=origin,
    )


def study(name: str, *figures: tuple[float, float], runs: float | None = None) -> StudyReport:
    """A study with a candidate for each of `figures`; with `runs` each has three, that factor around it."""
    trials = [record(i, CANDIDATES[i], *pair) for i, pair in enumerate(figures)]
    if runs is not None:
        for i, (tokens, ttft) in enumerate(figures):
            for factor in (runs, 1 / runs):
                number = len(trials)
                trials.append(record(number, CANDIDATES[i], tokens * factor, ttft * factor, of=i))
    return StudyReport(name=name, status="done", problem=PROBLEM, trials=tuple(trials), storage="sqlite:///x.db")


def compared(*reports: StudyReport, slos: tuple[Slo, ...] = ()) -> Comparison:
    return compare(reports, objectives=OBJECTIVES, slos=slos)


def test_shares_of_the_joint_hypervolume_by_hand() -> None:
    """The worst are 50 tokens/s and 40 ms, moved out by 10% of the ranges: the reference is (45, 43)."""
    found = compared(study("a", (100, 40), (50, 10)), study("b", (80, 20)))
    one, other = found.volumes["a"], found.volumes["b"]
    first = 55 * 3 + 5 * 30  # (100, 40) up to 43 ms, then (50, 10) below 40 ms
    second = 35 * 23
    joint = 55 * 3 + 35 * 20 + 5 * 10
    assert one.hypervolume == pytest.approx(first)
    assert other.hypervolume == pytest.approx(second)
    assert (one.share, other.share) == (pytest.approx(first / joint), pytest.approx(second / joint))
    assert (one.joint, other.joint, one.low) == (2, 1, None)
    assert found.share_difference("a", "b") is None, "nothing was repeated"


def test_intervals_of_hypervolumes_hold_the_value_and_grow_with_the_noise() -> None:
    quiet = compared(study("a", (100, 40), (50, 10), runs=1.01), study("b", (80, 20), runs=1.01))
    noisy = compared(study("a", (100, 40), (50, 10), runs=1.1), study("b", (80, 20), runs=1.1))
    for found in (quiet, noisy):
        volume = found.volumes["b"]
        assert volume.low is not None
        assert volume.high is not None
        assert volume.low < volume.share < volume.high
    widths = [(v.high or 0) - (v.low or 0) for v in (quiet.volumes["b"], noisy.volumes["b"])]
    assert 0 < widths[0] < widths[1] / 5
    clear, unclear = quiet.share_difference("a", "b"), noisy.share_difference("a", "b")
    assert clear is not None
    assert clear[0] > 0, "b dominates more, by more than the noise"
    assert unclear is not None
    assert unclear[0] < 0 < unclear[1]
    alike = compared(study("a", (80, 20), runs=1.05), study("b", (81, 20), runs=1.05)).share_difference("a", "b")
    assert alike is not None
    assert alike[0] < 0 < alike[1]


def test_welchs_test_by_hand() -> None:
    one, other = Spread(mean=100, log_stddev=0.02, degrees=4), Spread(mean=110, log_stddev=0.02, degrees=4)
    limit = quantile(8) * math.sqrt(2 * 0.02**2)  # equal variances and sizes: the degrees add
    assert exceeds_noise(one, replace(other, mean=100 * math.exp(limit * 1.01)))
    assert not exceeds_noise(one, replace(other, mean=100 * math.exp(limit * 0.99)))
    still = replace(one, log_stddev=0.0)
    assert exceeds_noise(still, replace(other, log_stddev=0.0))
    assert not exceeds_noise(still, still)


def test_the_best_under_each_slo_and_whether_it_is_more_than_noise() -> None:
    slos = (Slo(metric="ttft_p50_ms", threshold=30), Slo(metric="tpot_p50_ms", threshold=1e9))
    found = compared(
        study("a", (100, 40), (50, 10), runs=1.01), study("b", (80, 20), runs=1.01), study("c", (49.8, 10)), slos=slos
    )
    best = {(b.condition, b.metric): b for b in found.best}
    tokens = best["all SLOs", "output_tokens_per_s"]
    assert (tokens.winner, tokens.value("a"), tokens.value("b")) == (
        "b",
        pytest.approx(50, rel=1e-3),
        pytest.approx(80, rel=1e-3),
    )
    assert (tokens.clear["a"], tokens.clear["c"]) == (True, None)
    alone = best["tpot_p50_ms 1e+09 alone", "output_tokens_per_s"]
    assert (alone.winner, alone.value("a")) == ("a", pytest.approx(100, rel=1e-3))
    tight = compared(study("a", (100, 40)), study("b", (80, 20)), slos=(Slo(metric="ttft_p50_ms", threshold=5),))
    assert [b.winner for b in tight.best] == [None, None]
    assert tight.fronts == {"a": (), "b": ()}
    assert tight.volumes["a"].share == 0


def test_candidates_that_both_measured_are_paired() -> None:
    found = compared(study("a", (100, 40), (50, 10), runs=1.01), study("b", (50, 40), (50, 10), runs=1.01))
    tokens, ttft = found.shared
    assert (tokens.pairs, tokens.ratio, tokens.differing) == (2, pytest.approx(0.75), 1)
    assert (ttft.ratio, ttft.differing) == (pytest.approx(1), 0)


def test_studies_that_do_not_compare_are_told() -> None:
    one, other = study("a", (100, 40)), study("b", (80, 20))
    with pytest.raises(InvalidValueError, match="at least two different studies"):
        compared(one, one)
    with pytest.raises(InvalidValueError, match="at least two objectives"):
        compare([one, other], objectives=("ttft_p50_ms",))
    with pytest.raises(InvalidValueError, match="trial 0 of study a has no power_w; choose objectives with --by"):
        compare([one, other], objectives=("power_w", "ttft_p50_ms"))
    with pytest.raises(InvalidValueError, match="did you mean ttft_p50_ms"):
        compare([one, other], objectives=("ttft_50_ms", "output_tokens_per_s"))
    asked = replace(PROBLEM, workload=replace(PROBLEM.workload, shared_prefix=0.5))
    notes = compared(one, replace(other, problem=asked)).notes
    assert any("b has other users" in note for note in notes)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    return commands_in(tmp_path, monkeypatch, capsys)


def test_the_command_prints_and_writes_and_changes_nothing(invoke: Invoke) -> None:
    assert invoke("study", "run", "study.yaml").code == 0
    second = ("name=tight", "earlier_studies=none", "space.modes=aggregated", "slos.ttft_p99_ms=70")
    assert invoke("study", "run", "study.yaml", *(w for text in second for w in ("--set", text))).code == 0
    before = stored_rows()
    done = invoke("study", "compare", "toy", "tight", "--json", "--html", "page.html")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["studies"] == ["toy", "tight"]
    assert "slos.ttft_p99_ms: 60.0 -> 70.0" in found["study_file_differences"]["tight"]
    assert not any(line.startswith("name") for line in found["study_file_differences"]["tight"])
    assert any("tight searched with other SLOs" in note for note in found["notes"])
    assert max(volume["share"] for volume in found["hypervolumes"].values()) <= 1
    for best in found["best"]:
        values = [value for value in best["values"].values() if value is not None]
        assert best["values"][best["winner"]] in (min(values), max(values))
    for one in found["explained"]:
        settings = {cause["setting"]: (cause["winner"], cause["other"]) for cause in one["causes"]}
        assert all(winner != other for winner, other in settings.values())
        effects = [cause["effect"] for cause in one["causes"]]
        assert all(effect is None for effect in effects) == ("mode" in settings), "modes have no settings in common"
    page = Path("page.html").read_text()
    assert "Plotly.react" in page
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(https?:)?//""", page)
    shown = invoke("study", "compare", "toy", "tight").out
    assert "share of the" in shown
    assert "nothing was repeated" in shown
    assert invoke("study", "compare", "toy", "nothing").code == 2
    assert stored_rows() == before
