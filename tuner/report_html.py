"""The front as one self-contained HTML file: plotly.js is inside, nothing is fetched."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.subplots import make_subplots

from search_spaces.metrics import METRICS, Direction
from search_spaces.serving import Mode
from studies.records import TrialRecord
from tuner.report import StudyReport, mark, metrics_of, ties
from tuner.wording import metric_label, number, pools_text, slo_text

_COLOURS = {Mode.AGGREGATED: "#2f7ed8", Mode.DISAGGREGATED: "#e07b39"}
_SYMBOLS = {Mode.AGGREGATED: "circle", Mode.DISAGGREGATED: "diamond"}
_EARLY_TO_LATE = [[0.0, "#6fa3dc"], [1.0, "#e0602c"]]
_GREY = "#9aa3ad"
_FRONT = "#2a9d5c"
_PANEL_PX = 460


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of the table under the chart."""

    trial: int
    figures: tuple[str, ...]
    mode: str
    load: str
    devices: int
    runs: int
    ties: str
    pools: str


def write_front(report: StudyReport, path: Path) -> Path:
    """Write the report to `path`, making its folder, and return it."""
    environment = Environment(loader=PackageLoader("tuner"), autoescape=True)
    page = environment.get_template("front.html.j2").render(
        name=f"{report.name}{mark(report)}",
        summary=_summary(report),
        chart=Markup(_chart(report)),  # noqa: S704 - plotly's own HTML; texts inside are escaped in _hover
        headings=[metric_label(metric) for metric in report.objectives],
        rows=[_row(trial, report) for trial in report.front],
        legend=report.spreads.legend,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _summary(report: StudyReport) -> str:
    slos = ", ".join(map(slo_text, report.problem.slos)) or "none"
    infeasible = len(report.measured) - sum(trial.feasible for trial in report.measured)
    return (
        f"{len(report.measured)} trials measured, {infeasible} of them miss an SLO (SLOs: {slos}); "
        f"{len(report.front)} on the front. Model {report.problem.model.name}."
    )


def _row(trial: TrialRecord, report: StudyReport) -> _Row:
    candidate = trial.candidate
    return _Row(
        trial=trial.number,
        figures=tuple(report.spreads.figure(trial, name) for name in report.objectives),
        mode=str(candidate.config.mode) if candidate else "",
        load=str(candidate.load) if candidate else "",
        devices=candidate.config.devices if candidate else 0,
        runs=report.spreads.count(trial),
        ties=", ".join(map(str, ties(report, trial))),
        pools=pools_text(candidate) if candidate else "",
    )


def _chart(report: StudyReport) -> str:
    """Panels: one for each pair of objectives, then predicted against measured for each objective."""
    pairs = list(combinations(report.objectives, 2))
    titles = ["Measured trials"] * len(pairs) + [f"Predicted against measured: {name}" for name in report.objectives]
    columns = 2
    rows = -(-len(titles) // columns)
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles, vertical_spacing=0.16 / max(1, rows - 1))
    cells = [(index // columns + 1, index % columns + 1) for index in range(len(titles))]
    for (x, y), cell in zip(pairs, cells, strict=False):
        _add_front_panel(figure, report, (x, y), cell, legend=cell == cells[0])
    for metric, cell in zip(report.objectives, cells[len(pairs) :], strict=True):
        _add_prediction_panel(figure, report, metric, cell)
    figure.update_layout(
        height=_PANEL_PX * rows,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 60, "b": 60},
        legend={"orientation": "h", "y": 1.0 + 0.12 / rows, "x": 0},
        hoverlabel={"align": "left"},
    )
    return str(figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False}))


def _add_front_panel(
    figure: go.Figure, report: StudyReport, metrics: tuple[str, str], cell: tuple[int, int], *, legend: bool
) -> None:
    row, column = cell
    for trace in _front_traces(report, metrics, legend=legend):
        figure.add_trace(trace, row=row, col=column)
    figure.update_xaxes(title_text=metric_label(metrics[0]), rangemode="tozero", row=row, col=column)
    figure.update_yaxes(title_text=metric_label(metrics[1]), rangemode="tozero", row=row, col=column)


def _front_traces(report: StudyReport, metrics: tuple[str, str], *, legend: bool) -> Iterator[go.Scatter]:
    missed = [trial for trial in report.measured if not trial.feasible]
    yield _points(missed, metrics, "misses an SLO", {"color": _GREY, "symbol": "x", "size": 8}, legend=legend)
    for mode in Mode:
        trials = [t for t in report.measured if t.feasible and t.candidate and t.candidate.config.mode is mode]
        marker = {"color": _COLOURS[mode], "symbol": _SYMBOLS[mode], "size": 10}
        yield _points(trials, metrics, str(mode), marker, legend=legend)
    ring = {"color": "rgba(0,0,0,0)", "size": 16, "line": {"color": _FRONT, "width": 2.5}}
    front = _points(report.front, metrics, "Pareto front", ring, legend=legend)
    front.update(error_x=_error_bars(report, metrics[0]), error_y=_error_bars(report, metrics[1]))
    yield front
    if len(report.objectives) == 2:  # with more, a line through a projection would claim an order that is not there
        yield _staircase(report, metrics)


def _points(
    trials: Sequence[TrialRecord], metrics: tuple[str, str], name: str, marker: dict[str, object], *, legend: bool
) -> go.Scatter:
    values = [metrics_of(trial) for trial in trials]
    return go.Scatter(
        x=[value[metrics[0]] for value in values],
        y=[value[metrics[1]] for value in values],
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=legend,
        marker=marker,
        text=[_hover(trial) for trial in trials],
        hoverinfo="text",
    )


def _error_bars(report: StudyReport, metric: str) -> dict[str, object]:
    """The 95% intervals of the front's members; none where nothing says how much a figure varies."""
    found = [report.spreads.interval(trial, metric) for trial in report.front]
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.mean if i else None for i in found],
        "arrayminus": [i.mean - i.low if i else None for i in found],
        "color": _FRONT,
        "thickness": 1,
        "width": 3,
    }


def _staircase(report: StudyReport, metrics: tuple[str, str]) -> go.Scatter:
    """The edge of what the front dominates, by steps along the first objective."""
    points = sorted((metrics_of(trial)[metrics[0]], metrics_of(trial)[metrics[1]]) for trial in report.front)
    # Going up in x, y gets worse first where a larger x is better: the step then comes before the point.
    shape = "vh" if METRICS[metrics[0]].direction is Direction.MAXIMIZE else "hv"
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="lines",
        line={"color": _FRONT, "width": 1.5, "shape": shape, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )


def _hover(trial: TrialRecord) -> str:
    candidate = trial.candidate
    lines = [f"<b>trial {trial.number}</b>"]
    if candidate is not None:
        lines += [f"{candidate.config.mode} at {candidate.load}, {candidate.config.devices} devices"]
        lines += html.escape(pools_text(candidate, separator="\n")).split("\n")
    metrics = metrics_of(trial)
    lines += [f"{name} = {number(metrics[name])}" for name in _HOVER_METRICS if name in metrics]
    return "<br>".join(lines)


_HOVER_METRICS = (
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "e2e_p50_ms",
    "output_tokens_per_s",
    "output_tokens_per_s_per_gpu",
    "requests_per_s",
    "goodput_rps",
    "cost_per_million_output_tokens",
)


def _add_prediction_panel(figure: go.Figure, report: StudyReport, metric: str, cell: tuple[int, int]) -> None:
    row, column = cell
    known = [trial for trial in report.first_runs if trial.prediction and metric in trial.prediction.metrics]
    predicted = [trial.prediction.metrics[metric] for trial in known if trial.prediction]
    measured = [metrics_of(trial)[metric] for trial in known]
    if known:
        span = [min(*predicted, *measured), max(*predicted, *measured)]
        line = {"color": _GREY, "width": 1, "dash": "dash"}
        exact = go.Scatter(x=span, y=span, mode="lines", line=line, hoverinfo="skip", showlegend=False)
        figure.add_trace(exact, row=row, col=column)
    marker = {"color": list(range(len(known))), "colorscale": _EARLY_TO_LATE, "size": 9}
    texts = [f"{_hover(t)}<br>predicted {number(p)}" for t, p in zip(known, predicted, strict=True)]
    points = go.Scatter(
        x=predicted, y=measured, mode="markers", marker=marker, text=texts, hoverinfo="text", showlegend=False
    )
    figure.add_trace(points, row=row, col=column)
    unit = METRICS[metric].unit
    figure.update_xaxes(title_text=f"predicted before measuring ({unit}); later trials are redder", row=row, col=column)
    figure.update_yaxes(title_text=f"measured ({unit})", row=row, col=column)
