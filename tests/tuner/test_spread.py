"""Reports of studies with repeats: intervals, ties, noise and drift, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.outcome import Probe
from studies.records import Origin, TrialRecord
from tests.studies.test_repeats import scaled
from tests.studies.toy import measure
from tests.support.reports import a_report, trial
from tests.tuner.test_report import text_of
from tuner import report as reports
from tuner.report_html import write_front
from tuner.wording import rate_text

RATE = "output_tokens_per_s"


def again(number: int, first: TrialRecord, factor: float, origin: Origin = Origin.CONFIRM) -> TrialRecord:
    """A repeat of `first`, its throughput off by `factor`."""
    found = a_report()
    assert first.candidate is not None
    run = trial(number, first.candidate, found.problem)
    outcome = scaled(measure(first.candidate), factor)
    flat = outcome.metrics.flat()
    values = tuple(flat[name] for name in found.objectives)
    return replace(run, origin=origin, repeat_of=first.number, outcome=outcome, values=values)


def repeated() -> reports.StudyReport:
    """The toy report, its default measured four times as a control and each member of its front three times."""
    found = a_report()
    trials = list(found.trials)
    default = trials[0] = replace(trials[0], origin=Origin.DEFAULT)
    members = [member for member in found.front if member.number != 0]
    for factor in (1.02, 0.97, 1.01):
        trials.append(again(len(trials), default, factor, Origin.CONTROL))
    for member in members:
        trials += [again(len(trials) + n, member, factor) for n, factor in enumerate((0.98, 1.02))]
    return replace(found, trials=tuple(trials))


def test_figures_have_intervals_runs_and_ties() -> None:
    found = repeated()
    text = text_of(reports.front_table(found))
    for member in found.front:
        runs = found.spreads.count(member)
        assert runs in (3, 4)
        interval = found.spreads.interval(member, RATE)
        assert interval is not None
        assert str(interval.basis) == "repeats"
        assert interval.low < interval.mean < interval.high
        mean = sum(found.spreads.runs[member.key or ""].values_of(RATE)) / runs
        assert interval.mean == pytest.approx(mean)
        assert reports.metrics_of(member)[RATE] == pytest.approx(mean)
    assert "95% interval of the mean" in text
    assert "ties" in text
    assert re.search(r"\u00b1\d\.\d%", text)
    narrow = text_of(reports.front_table(found), width=80)
    assert "output_tokens_per_s" in "".join(narrow.split())
    assert "\u2026" not in narrow, "nothing is cut off"


def test_a_candidate_of_one_run_has_the_interval_of_the_studys_noise_and_says_so() -> None:
    found = repeated()
    single = next(t for t in found.measured if found.spreads.count(t) == 1 and t.feasible)
    interval = found.spreads.interval(single, RATE)
    assert interval is not None
    assert str(interval.basis) == "noise of the study"
    assert "\u00b1~" in found.spreads.figure(single, RATE)


def test_an_interval_that_reaches_beyond_an_slo_is_marked() -> None:
    found = repeated()
    (slo,) = found.problem.slos
    member = found.front[0]
    near = replace(slo, metric=RATE, threshold=reports.metrics_of(member)[RATE] * 0.99)
    far = replace(slo, metric=RATE, threshold=reports.metrics_of(member)[RATE] * 0.5)
    assert found.spreads.figure(member, RATE, near).endswith("?")
    assert not found.spreads.figure(member, RATE, far).endswith("?")


def test_what_differs_within_the_noise_is_a_tie() -> None:
    found = repeated()
    default = found.candidates[0]
    twin = replace(default, number=58, key="twin")
    close = again(58, default, 1.03)
    spreads = replace(
        found.spreads, runs={**found.spreads.runs, "twin": replace(found.spreads.runs[default.key or ""], first=close)}
    )
    assert spreads.tied(default, [twin], RATE) == (58,)
    assert spreads.ties(default, [twin], found.objectives) == (58,)
    best = max(found.measured, key=lambda t: reports.metrics_of(t)[RATE])
    assert found.spreads.tied(default, [best], RATE) == ()


def test_noise_and_drift_are_shown_and_told_to_programs() -> None:
    found = repeated()
    text = text_of(reports.show(found))
    assert "Noise and drift" in text
    assert "no clear drift" in text
    assert f"The control, trial 0, was measured {found.spreads.count(found.candidates[0])} times" in text
    tree = json.loads(json.dumps(reports.show_json(found), allow_nan=False))
    assert 0.01 < tree["stability"]["noise"][RATE]["log_stddev"] < 0.05
    assert tree["stability"]["drift"][RATE]["clear"] is False
    assert tree["counts"]["repeats"] == found.repeats == len(found.trials) - len(a_report().trials)
    assert len(tree["trials"]) == len(found.trials)
    assert {t["repeat_of"] for t in tree["trials"]} > {None, 0}


def test_json_and_csv_of_the_front_hold_means_and_intervals() -> None:
    found = repeated()
    tree = json.loads(json.dumps(reports.front_json(found), allow_nan=False))
    rows = list(csv.DictReader(io.StringIO(reports.front_csv(found))))
    for member, told, row in zip(found.front, tree["front"], rows, strict=True):
        interval = told["intervals"][RATE]
        assert told["trial"] == member.number
        assert told["runs"] == [t.number for t in found.spreads.runs[member.key or ""].finished]
        assert interval["low"] < told["objectives"][RATE] < interval["high"]
        assert (interval["runs"], interval["basis"], interval["level"]) == (len(told["runs"]), "repeats", 0.95)
        assert float(row[f"{RATE}_low"]) == pytest.approx(interval["low"])
        assert int(row["runs"]) == len(told["runs"])
        assert isinstance(told["ties_with"], list)


def test_predictions_are_held_against_first_runs_alone() -> None:
    """Repeats are predicted by a model that has seen their candidate: they would flatter it."""
    found = repeated()
    assert len(found.first_runs) == len(a_report().measured)
    plain = reports.show_json(a_report())
    assert reports.show_json(found)["prediction_error"] == plain["prediction_error"]


def test_the_html_says_how_sure_it_is(tmp_path: Path) -> None:
    found = repeated()
    page = write_front(found, tmp_path / "front.html").read_text()
    assert "95% interval of the mean" in page
    assert re.search(r'<td class="figure">[\d.,]+ \u00b1\d\.\d%</td>', page)
    assert "<th>ties with</th>" in page
    assert "error_x" in page, "the front has error bars"
    plain = write_front(a_report(), tmp_path / "plain.html").read_text()
    assert "Nothing was measured twice" in plain


def test_a_report_without_repeats_says_that_noise_is_unknown() -> None:
    assert "Nothing was measured twice" in text_of(reports.front_table(a_report()))
    assert "Noise and drift are not known" in text_of(reports.show(a_report()))


def test_wide_intervals_are_factors() -> None:
    found = a_report()
    first = found.front[0]
    twice = replace(found, trials=(*found.trials, again(len(found.trials), first, 1.5)))
    assert "\u00d7/\u00f7~" in twice.spreads.figure(twice.front[0], RATE)


def test_highest_rates_of_several_runs_are_held_by_one_interval() -> None:
    found = repeated()
    member = next(m for m in found.front if m.number)
    probes = iter([((4.0, True), (5.0, False)), ((3.0, True), (3.3, False)), ((4.5, True), (5.5, False))])

    def searched(record: TrialRecord) -> TrialRecord:
        if record.key != member.key or record.measurement is None:
            return record
        told = tuple(Probe(request_rate=rate, met=met) for rate, met in next(probes))
        return replace(record, outcome=replace(record.measurement, probes=told))

    rated = replace(found, trials=tuple(searched(t) for t in found.trials))
    assert rated.spreads.highest_rate(member) == (3.0, 5.5)
    assert found.spreads.highest_rate(member) is None
    told = next(t for t in reports.front_json(rated)["front"] if t["trial"] == member.number)  # type: ignore[index,union-attr]
    assert told["highest_rate"]["met"] == 4.0  # type: ignore[index,call-overload]  # of its first run
    assert len(told["highest_rate"]["probes"]) == 2  # type: ignore[index,call-overload,arg-type]  # likewise
    assert rate_text(3.0, 5.5) == "3 to 5.5/s"
    assert rate_text(None, 0.1) == "below 0.1/s"
    assert rate_text(64.0, None) == "at least 64/s"
