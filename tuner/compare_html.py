"""A comparison as one self-contained HTML file: plotly.js is inside, nothing is fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from jinja2 import Environment, PackageLoader

from search_spaces.metrics import METRICS, Direction
from studies.codec import Json
from studies.records import TrialRecord
from tuner.compare_causes import Explained
from tuner.compare_report import MARKS, best_text, explained_text, interval_text, shared_text, volume_words
from tuner.comparison import Comparison
from tuner.report import mark, metrics_of
from tuner.report_figures import Chart, axis_title
from tuner.report_html import PARTS, part
from tuner.wording import metric_label, number, pools_text, slo_text

_COLOURS = ("#2f7ed8", "#e07b39", "#2a9d5c", "#9b59b6", "#c0392b", "#16a085", "#b7950b", "#7f8c8d")


def write_comparison(
    found: Comparison, explained: Sequence[Explained], questions: Mapping[str, Sequence[str]], path: Path
) -> Path:
    """Write the page to `path`, making its folder, and return it."""
    environment = Environment(loader=PackageLoader("tuner", "templates/report"), autoescape=True)
    charts = [_chart(found, pair, index) for index, pair in enumerate(combinations(found.objectives, 2))]
    page = environment.get_template("compare.html.j2").render(
        title=" · ".join(found.names),
        emulated=[f"{report.name}{mark(report)}" for report in found.reports if report.emulated],
        objectives="; ".join(map(metric_label, found.objectives)),
        slos="; ".join(map(slo_text, found.slos)) or "none",
        notes=found.notes,
        questions=questions,
        first=found.names[0],
        charts=charts,
        specs={chart.id: chart.spec for chart in charts},
        volumes=[
            (name, f"{v.share:.1%}", interval_text(v), v.members, v.joint, len(found.report(name).measured))
            for name, v in found.volumes.items()
        ],
        volume_words=volume_words(found).split("\n"),
        names=found.names,
        best=[
            (b.condition, f"{b.metric} ({METRICS[b.metric].unit})", [best_text(found, b, n) for n in found.names])
            for b in found.best
        ],
        marks=MARKS,
        shared=[shared_text(one) for one in found.shared],
        explained=[explained_text(one) for one in explained],
        parts={name: part(name) for name in PARTS},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _chart(found: Comparison, pair: tuple[str, str], index: int) -> Chart:
    """Every study's measured candidates and its front over a pair of objectives."""
    traces: list[Json] = []
    for place, name in enumerate(found.names):
        traces += _traces(found, name, pair, _COLOURS[place % len(_COLOURS)])
    return Chart(
        id=f"fronts-{index}",
        title=f"{pair[0]} against {pair[1]}",
        caption="Large points are the fronts, with 95% intervals where they are known; crosses miss an SLO.",
        spec={
            "data": traces,
            "layout": {
                "xaxis": {"title": {"text": axis_title(pair[0])}, "rangemode": "tozero"},
                "yaxis": {"title": {"text": axis_title(pair[1])}, "rangemode": "tozero"},
                "margin": {"l": 60, "r": 20, "t": 20, "b": 60},
                "legend": {"orientation": "h", "y": 1.12, "x": 0},
            },
        },
    )


def _traces(found: Comparison, name: str, pair: tuple[str, str], colour: str) -> list[Json]:
    report = found.report(name)
    on_front = {trial.number for trial in found.fronts[name]}
    others = [trial for trial in report.measured if trial.number not in on_front]
    members = sorted(found.fronts[name], key=lambda trial: metrics_of(trial)[pair[0]])
    symbols: list[Json] = ["circle" if trial.feasible else "x" for trial in others]
    rest = _scatter(name, others, pair, {"color": colour, "size": 6, "opacity": 0.35, "symbol": symbols})
    front = _scatter(name, members, pair, {"color": colour, "size": 11})
    front |= {"error_x": _bars(found, name, members, pair[0]), "error_y": _bars(found, name, members, pair[1])}
    if len(found.objectives) == 2:  # with more, a line through a projection would claim an order that is not there
        shape = "vh" if METRICS[pair[0]].direction is Direction.MAXIMIZE else "hv"
        front |= {"mode": "lines+markers", "line": {"color": colour, "width": 1.5, "shape": shape}}
    return [rest | {"showlegend": False}, front]


def _scatter(
    name: str, trials: Sequence[TrialRecord], pair: tuple[str, str], marker: dict[str, Json]
) -> dict[str, Json]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(name),
        "legendgroup": html.escape(name),
        "x": [metrics_of(trial)[pair[0]] for trial in trials],
        "y": [metrics_of(trial)[pair[1]] for trial in trials],
        "marker": marker,
        "text": [_hover(name, trial, pair) for trial in trials],
        "hoverinfo": "text",
    }


def _bars(found: Comparison, name: str, members: Sequence[TrialRecord], metric: str) -> Json:
    """95% intervals of the front's members; none where nothing says how much a figure varies."""
    intervals = [found.report(name).spreads.interval(trial, metric) for trial in members]
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.mean if i else None for i in intervals],
        "arrayminus": [i.mean - i.low if i else None for i in intervals],
        "thickness": 1,
        "width": 3,
    }


def _hover(name: str, trial: TrialRecord, pair: tuple[str, str]) -> str:
    lines = [f"<b>{html.escape(name)} trial {trial.number}</b>"]
    if trial.candidate is not None:
        lines += [f"{trial.candidate.config.mode} at {trial.candidate.load}"]
        lines += html.escape(pools_text(trial.candidate, separator="\n")).split("\n")
    lines += [f"{metric} = {number(metrics_of(trial)[metric])}" for metric in pair]
    return "<br>".join(lines)
