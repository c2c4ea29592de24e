"""Reports: what a front says in text, JSON and HTML."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from search_spaces.serving import Mode
from tests.studies.toy import toy_problem, wide_space
from tests.support.reports import a_report
from tuner import report
from tuner.report_html import write_front
from tuner.wording import candidate_text, duration, number


def text_of(renderable: RenderableType, width: int = 250) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_table_holds_exactly_the_front_best_first() -> None:
    found = a_report()
    text = text_of(report.front_table(found))
    numbers = [t.number for t in found.front]
    assert [int(n) for n in re.findall(r"^ *(\d+) ", text, re.MULTILINE)] == numbers * 2  # figures, then configurations
    rates = [report.metrics_of(t)["output_tokens_per_s"] for t in found.front]
    assert rates == sorted(rates, reverse=True)
    assert "ttft_p99_ms" in text
    narrow = text_of(report.front_table(found), width=80)
    assert "output_tokens_per_s" in "".join(narrow.split())
    assert "\u2026" not in narrow


def test_no_member_of_the_front_misses_an_slo() -> None:
    found = a_report()
    assert any(not t.feasible for t in found.measured)
    assert all(report.metrics_of(t)["ttft_p99_ms"] <= 120 for t in found.front)


def test_a_study_at_a_glance_shows_the_engines_last_lines() -> None:
    text = text_of(report.show(a_report()))
    for part in ("out_of_memory_at_boot", "exit code 12", "| failed to allocate", "ttft_p99_ms at most 120", "50%"):
        assert part in text
    assert "| one" not in text


def test_the_prediction_error_is_relative_to_what_was_measured() -> None:
    found = a_report()
    assert report.median_error(found.measured, "ttft_p50_ms") is not None
    assert abs((report.median_error(found.measured, "ttft_p50_ms") or 0) - 0.5) < 1e-9
    assert report.median_error(found.trials[-1:], "ttft_p50_ms") is None


def test_the_coverage_is_the_share_of_measurements_inside_their_interval() -> None:
    """Predictions are half again what was measured: 1.645 standard deviations of 0.2465 away."""
    found = a_report()
    assert report.coverage(found.measured, "ttft_p50_ms") is None, "no interval was given"
    spreads = [0.24, 0.25, *[1.0] * len(found.measured)]
    stated = [
        replace(t, prediction=replace(t.prediction, log_stddev={"ttft_p50_ms": spread}))
        for t, spread in zip(found.measured, spreads, strict=False)
        if t.prediction is not None
    ]
    assert report.coverage(stated[:1], "ttft_p50_ms") == 0.0
    assert report.coverage(stated[1:2], "ttft_p50_ms") == 1.0
    assert report.coverage(stated, "ttft_p50_ms") == pytest.approx(1 - 1 / len(stated))
    shown = text_of(report.show(replace(found, trials=tuple(stated))))
    assert "in 90% interval" in shown
    assert f"{1 - 1 / len(stated):.0%}" in shown


def test_json_is_json_and_complete() -> None:
    found = a_report()
    tree = json.loads(json.dumps(report.show_json(found), allow_nan=False))
    assert len(tree["trials"]) == len(found.trials)
    assert tree["trials"][-1]["failure"]["reason"] == "out_of_memory_at_boot"
    assert tree["counts"]["measured"] == len(found.measured)
    assert [t["trial"] for t in json.loads(json.dumps(report.front_json(found)))["front"]] == tree["front"]


def test_the_html_needs_no_network_and_escapes(tmp_path: Path) -> None:
    found = a_report()
    model = replace(found.problem.model, name="<script>alert(1)</script>")
    found = replace(found, problem=replace(found.problem, model=model))
    page = write_front(found, tmp_path / "deep" / "front.html").read_text()
    assert "<script>alert(1)</script>" not in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(https?:)?//""", page)
    assert "Plotly.react" in page
    for member in found.front:
        assert f"trial {member.number}\\u003c/b\\u003e" in page
    assert page.count('<td class="figure">') == len(found.front) * 4
    assert len(page) < 5_000_000


def test_the_html_of_a_study_without_any_measurement(tmp_path: Path) -> None:
    found = replace(a_report(), trials=())
    assert "0 trials measured" in write_front(found, tmp_path / "front.html").read_text()
    assert "no measured trial yet" in text_of(report.front_table(found))


def test_a_disaggregated_candidate_in_words() -> None:
    space = wide_space(toy_problem())
    assert (
        candidate_text(space.default(Mode.DISAGGREGATED))
        == "disaggregated 1P x [defaults] + 1D x [defaults] at concurrency=4"
    )


def test_numbers_and_durations_in_words() -> None:
    assert [number(v) for v in (0, 0.00012345, 0.01234, 1.2345, 123.45, 12345.6)] == [
        "0",
        "1.2e-04",
        "0.0123",
        "1.23",
        "123",
        "12,346",
    ]
    assert [duration(s) for s in (4.4, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 5 min"]


def test_figures_of_no_hardware_are_marked_wherever_they_appear(tmp_path: Path) -> None:
    found = a_report()
    trials = tuple(
        replace(t, outcome=replace(t.measurement, emulated=True)) if t.measurement is not None else t
        for t in found.trials
    )
    emulated = replace(found, trials=trials)
    assert "(EMULATED: not measured" in text_of(report.front_table(emulated))
    assert "(EMULATED: not measured" in text_of(report.show(emulated))
    assert report.front_json(emulated)["emulated"] is True
    assert ",True," in report.front_csv(emulated).splitlines()[1]
    page = write_front(emulated, tmp_path / "front.html").read_text()
    assert re.search(r"<title>[^<]*EMULATED", page)
    assert re.search(r"<h1>[^<]*EMULATED", page)
    assert "EMULATED" not in text_of(report.show(found))
    assert report.front_json(found)["emulated"] is False
