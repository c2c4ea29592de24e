"""The report of a study as one self-contained HTML file: plotly.js is inside, nothing is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from studies.noise import Stability
from studies.records import TrialRecord
from tuner.report import StudyReport, configuration_text, error_metrics, spent_text, ties
from tuner.report_cloud import NO_CLOUD, read_cloud
from tuner.report_figures import hypervolume_chart, operating_points, predicted_against_measured, shown_metrics
from tuner.report_story import story_of
from tuner.wording import metric_label

PARTS = ("report.css", "report.js", "plotly-basic.min.js", "plotly-LICENSE.txt")
"""What stands inside every page."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A member of the front in the table."""

    trial: int
    recommended: bool
    figures: tuple[str, ...]
    runs: int
    ties: str
    devices: int
    configuration: str


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """Noise and drift of a metric in words."""

    metric: str
    noise: str
    degrees: int
    drift: str


def write_front(report: StudyReport, path: Path, predictions: Path | None = None) -> Path:
    """Write the report to `path`, making its folder, and return it.

    `predictions` is the folder of what the screen turned down, shown as a cloud behind what was measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_html(report, predictions), encoding="utf-8")
    return path


def report_html(report: StudyReport, predictions: Path | None = None) -> str:
    """The whole page."""
    cloud = read_cloud(predictions, shown_metrics(report)) if predictions else NO_CLOUD
    points, predicted, growth = (
        operating_points(report, cloud),
        predicted_against_measured(report),
        hypervolume_chart(report),
    )
    charts = [*points, *predicted, *([growth] if growth else [])]
    environment = Environment(loader=PackageLoader("tuner", "templates/report"), autoescape=True)
    environment.filters["label"] = metric_label
    return environment.get_template("page.html.j2").render(
        report=report,
        story=story_of(report),
        specs={chart.id: chart.spec for chart in charts},
        points=points,
        predicted=predicted,
        growth=growth,
        rows=[_row(trial, report) for trial in report.front],
        noise=_noise(report.spreads.stability, error_metrics(report)),
        infeasible=len(report.measured) - sum(trial.feasible for trial in report.measured),
        spent=spent_text(report),
        parts={name: part(name) for name in PARTS},
    )


def part(name: str) -> Markup:
    """A file of the page: style, script or licence."""
    return Markup((files("tuner") / "templates" / "report" / name).read_text(encoding="utf-8"))  # noqa: S704 - our files


def _row(trial: TrialRecord, report: StudyReport) -> _Row:
    return _Row(
        trial=trial.number,
        recommended=trial.number == report.front[0].number,
        figures=tuple(report.spreads.figure(trial, name) for name in report.objectives),
        runs=report.spreads.count(trial),
        ties=", ".join(map(str, ties(report, trial))),
        devices=trial.candidate.config.devices if trial.candidate else 0,
        configuration=configuration_text(report, trial),
    )


def _noise(stability: Stability, metrics: tuple[str, ...]) -> list[_Noise]:
    found = []
    for metric in metrics:
        if metric in stability.noise:
            noise, drift = stability.noise[metric], stability.drift.get(metric)
            text = "-"
            if drift is not None:
                verdict = "drifts" if drift.is_clear else "no clear drift"
                text = f"{drift.change:+.1%} ({drift.low:+.1%} to {drift.high:+.1%}), {verdict}"
            found.append(_Noise(metric=metric, noise=f"{noise.log_stddev:.1%}", degrees=noise.degrees, drift=text))
    return found
