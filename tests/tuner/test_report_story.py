"""The report in words, as Markdown and JSON; settings that mattered; predictions behind the chart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import plotly.graph_objects as go
import pytest

from search_spaces.metrics import METRICS
from studies.predictions import PredictionLog, Rejected
from studies.records import Origin, TrialRecord
from tests.support.reports import a_report
from tuner.report import StudyReport, metrics_of
from tuner.report_cloud import NO_CLOUD, read_cloud
from tuner.report_dashboard import note_of, views_of
from tuner.report_figures import hypervolume_chart, operating_points, predicted_against_measured
from tuner.report_importance import importances
from tuner.report_markdown import report_markdown
from tuner.report_story import report_json, story_of


def with_default(number: int) -> StudyReport:
    """The toy's report where trial `number` is the engine's default."""
    found = a_report()
    trials = tuple(replace(t, origin=Origin.DEFAULT) if t.number == number else t for t in found.trials)
    return replace(found, trials=trials)


def test_the_answer_names_the_best_of_the_front_and_its_gain_over_the_default() -> None:
    plain = a_report()
    default = plain.front[-1]
    found = with_default(default.number)
    story = story_of(found)
    best, metric = plain.front[0], plain.objectives[0]
    ratio = metrics_of(best)[metric] / metrics_of(default)[metric]
    assert story.recommended is not None
    assert story.recommended.number == best.number
    assert f"Trial {best.number}," in story.answer
    assert f"{ratio:.3g} times the engine's default" in story.answer
    assert f"tuner deploy toy --trial {best.number} --target shell" in story.commands[0][1]
    row = next(row for row in story.compared if row.metric == metric)
    assert row.change == f"{ratio - 1:+.0%}"
    assert row.better is True


def test_a_default_that_is_best_is_said_to_be() -> None:
    found = with_default(a_report().front[0].number)
    story = story_of(found)
    assert "itself the recommended" in story.default_note
    assert story.compared == ()


def test_defaults_that_failed_are_named() -> None:
    found = with_default(a_report().front[-1].number)
    dead = replace(found.trials[-1], key="another", origin=Origin.DEFAULT)
    note = story_of(replace(found, trials=(*found.trials[:-1], dead))).default_note
    assert f"Defaults that failed: trial {dead.number} (aggregated): out_of_memory_at_boot." in note


def test_a_study_that_meets_no_slo_recommends_nothing() -> None:
    found = a_report()
    trials = tuple(replace(t, violations={"ttft_p99_ms": 1.0}) for t in found.trials)
    story = story_of(replace(found, trials=trials))
    assert story.recommended is None
    assert "meets every SLO" in story.answer
    assert not any("deploy" in command for _, command in story.commands)
    assert "No configuration" in report_markdown(replace(found, trials=trials))


def test_failures_are_grouped_with_an_example() -> None:
    found = a_report()
    lost = replace(found.trials[-1], number=99)
    (group,) = story_of(replace(found, trials=(*found.trials, lost))).failures
    assert group.reason == "out_of_memory_at_boot"
    assert group.trials == (found.trials[-1].number, 99)
    assert "failed to allocate" in group.log_tail


def test_a_setting_that_decides_everything_has_the_whole_share_and_noise_has_none() -> None:
    found = a_report()
    metric = "ttft_p50_ms"
    measured = found.measured
    shares = {i.setting: i.share for i in importances(measured, metric)}
    assert shares
    assert all(0 <= share <= 1 for share in shares.values())
    modes = {str(t.candidate.config.mode) for t in measured if t.candidate}
    assert len(modes) == 2
    decided = tuple(_with(t, 10.0 if t.candidate and "dis" in t.candidate.config.mode else 20.0) for t in measured)
    assert {i.setting: i.share for i in importances(decided, metric)}["mode"] == pytest.approx(1.0)
    assert importances(tuple(_with(t, 7.0) for t in measured), metric) == (), "nothing varies"
    assert importances(measured[:3], metric) == (), "too few"


def _with(trial: TrialRecord, ttft_ms: float) -> TrialRecord:
    """`trial` with its median TTFT set."""
    measurement = trial.measurement
    assert measurement is not None
    latency = replace(measurement.metrics.ttft_ms, p50=ttft_ms)
    return replace(trial, outcome=replace(measurement, metrics=replace(measurement.metrics, ttft_ms=latency)))


def test_every_chart_is_a_figure_that_plotly_takes() -> None:
    found = a_report()
    growth = hypervolume_chart(found)
    assert growth is not None
    charts = [*operating_points(found), *predicted_against_measured(found), growth]
    assert len(charts) >= 5
    for chart in charts:
        assert len(go.Figure(chart.spec).data) == len(chart.spec["data"])
        json.dumps(chart.spec, allow_nan=False)
    heights = growth.spec["data"][0]["y"]
    assert heights == sorted(heights)
    assert heights[-1] == 1.0


def test_the_cloud_holds_each_candidate_once_as_last_predicted(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p")
    for value, key in ((1.0, "a"), (2.0, "b"), (3.0, "a")):
        metrics = {"ttft_p50_ms": value, "output_tokens_per_s": 10 * value}
        log.add(Rejected(trial=0, key=key, genotype={}, metrics=metrics, score=None, reason="other"))
    log.flush()
    cloud = read_cloud(tmp_path / "p", ["ttft_p50_ms", "output_tokens_per_s"])
    assert cloud.total == 2
    assert cloud.pairs("ttft_p50_ms", "output_tokens_per_s") == ([2.0, 3.0], [20.0, 30.0])
    assert len(read_cloud(tmp_path / "p", ["ttft_p50_ms"], shown=1).columns["ttft_p50_ms"]) == 1
    assert read_cloud(tmp_path / "none", list(METRICS)) == NO_CLOUD


def test_markdown_and_json_say_the_same() -> None:
    found = replace(with_default(0), study_file="name: toy\n")
    tree = json.loads(json.dumps(report_json(found), allow_nan=False))
    text = report_markdown(found)
    assert tree["answer"] in text
    assert tree["recommended"] == found.front[0].number
    assert all(command["command"] in text for command in tree["commands"])
    assert text.count("| ---") >= 4
    assert "name: toy" in text


def test_notes_say_what_was_measured_and_why_it_failed() -> None:
    found = a_report()
    views = views_of(found)
    assert set(views.notes) == {t.number for t in found.trials}
    failed = note_of(found, found.trials[-1])
    assert "Reason: **out_of_memory_at_boot**. exit code 12" in failed
    assert "failed to allocate" in failed
    missed = next(t for t in found.measured if not t.feasible)
    assert "Misses its limits: ttft_p99_ms by" in views.notes[missed.number]
    assert "Meets every SLO." in views.notes[found.front[0].number]
    assert story_of(found).answer in views.summary
