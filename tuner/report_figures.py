"""The charts of a study as plotly figures in plain JSON; colours of ground and text are left to the page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from search_spaces.metrics import METRICS, Direction
from search_spaces.serving import Mode
from studies.codec import Json
from studies.pareto import hypervolume_history
from studies.records import TrialRecord
from studies.spending import spent
from tuner.report import StudyReport, metrics_of
from tuner.report_cloud import NO_CLOUD, Cloud
from tuner.wording import number, pools_text

COLOURS = {Mode.AGGREGATED: "#2f7ed8", Mode.DISAGGREGATED: "#e07b39"}
_SYMBOLS = {Mode.AGGREGATED: "circle", Mode.DISAGGREGATED: "diamond"}
GREY, FRONT, SLO = "#8a94a0", "#1f9d63", "rgba(31,157,99,0.09)"
_CLOUD = "rgba(138,148,160,0.35)"
_PER_GPU, _PER_USER = "output_tokens_per_s_per_gpu", "output_tokens_per_s_per_user"
_COST = "cost_per_million_output_tokens"
_HOVER_METRICS = (
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "e2e_p50_ms",
    "output_tokens_per_s",
    _PER_GPU,
    _PER_USER,
    "requests_per_s",
    "goodput_rps",
    _COST,
)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with what it shows in words; `spec` is plotly's {data, layout}."""

    id: str
    title: str
    caption: str
    spec: dict[str, Json]


def operating_points(report: StudyReport, cloud: Cloud = NO_CLOUD) -> tuple[Chart, ...]:
    """Measured candidates over pairs of metrics: throughput per GPU against what users see, then objectives."""
    return tuple(_points_chart(report, cloud, x, y) for x, y in _pairs(report))


def shown_metrics(report: StudyReport) -> tuple[str, ...]:
    """Every metric that is an axis of an operating-points chart."""
    return tuple(dict.fromkeys(metric for pair in _pairs(report) for metric in pair))


def _pairs(report: StudyReport) -> list[tuple[str, str]]:
    asked = (*(slo.metric for slo in report.problem.slos), *report.objectives)
    ttft = next((metric for metric in asked if metric.startswith("ttft_")), "ttft_p50_ms")
    wanted = [(_PER_USER, _PER_GPU), (ttft, _PER_GPU)]
    if any(pool.price_per_hour > 0 for pool in report.problem.node_pools):
        wanted.append((_PER_USER, _COST))
    wanted += [(y, x) for x, y in combinations(report.objectives, 2)]
    known = {metric for trial in report.measured for metric in metrics_of(trial)}
    unique = {frozenset(pair): pair for pair in reversed(wanted) if set(pair) <= known}
    return list(reversed(unique.values()))[:5]


def _points_chart(report: StudyReport, cloud: Cloud, x: str, y: str) -> Chart:
    traces = list(_point_traces(report, cloud, (x, y)))
    shown = len(cloud.pairs(x, y)[0])
    of = f"{shown:,} of " if shown < cloud.total else ""
    behind = f" Behind them {of}{cloud.total:,} predictions that were not measured." if shown else ""
    known = any(report.spreads.interval(trial, metric) for trial in report.measured for metric in (x, y))
    bars = "; bars are 95% intervals" if known else ""
    return Chart(
        id=f"points-{x}-{y}".replace("_", "-"),
        title=f"{_plain(y)} against {_plain(x)}",
        caption=f"Measured candidates{bars}.{_region_text(report, x, y)}{behind}",
        spec={"data": list(traces), "layout": _ranged(_layout(x, y, shapes=_slo_shapes(report, x, y)), report, x, y)},
    )


def _ranged(layout: dict[str, Json], report: StudyReport, x: str, y: str) -> dict[str, Json]:
    """`layout` with axes from 0 to somewhat beyond what was measured: predictions far outside would squeeze it."""
    for name, metric in (("xaxis", x), ("yaxis", y)):
        axis, largest = layout[name], _largest(report, metric)
        if isinstance(axis, dict) and largest > 0:
            axis["range"] = [0, 1.3 * largest]
    return layout


def _region_text(report: StudyReport, x: str, y: str) -> str:
    return " Shaded is what meets the SLOs." if _slo_shapes(report, x, y) else ""


def _plain(metric: str) -> str:
    """A metric's name as people write it, such as TTFT p99 or output tokens/s/GPU."""
    text = metric.removesuffix("_ms").replace("_", " ")
    for name in ("ttft", "tpot", "itl", "e2e"):
        text = text.replace(f"{name} ", f"{name.upper()} ")
    for divisor, short in (("s", "s"), ("gpu", "GPU"), ("user", "user"), ("dollar", "dollar")):
        text = re.sub(rf" per {divisor}\b", f"/{short}", text)
    return text


def _layout(x: str, y: str, shapes: Sequence[Json] = ()) -> dict[str, Json]:
    return {
        "margin": {"l": 62, "r": 14, "t": 10, "b": 52},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": axis_title(x)}, "rangemode": "tozero", "automargin": True},
        "yaxis": {"title": {"text": axis_title(y)}, "rangemode": "tozero", "automargin": True},
        "shapes": list(shapes),
    }


def axis_title(metric: str) -> str:
    """Name, unit and better direction of a metric, short enough for a phone."""
    arrow = "\u2193" if METRICS[metric].direction is Direction.MINIMIZE else "\u2191"
    name, unit = _plain(metric), METRICS[metric].unit
    return f"{name} {arrow}" if name.endswith(unit) else f"{name} ({unit}) {arrow}"


def _slo_shapes(report: StudyReport, x: str, y: str) -> list[Json]:
    """A rectangle over the region that meets the SLOs on the axes' metrics; none where no SLO is on them."""
    bounds = {slo.metric: slo.threshold for slo in report.problem.slos if slo.metric in (x, y)}
    if not bounds:
        return []
    return [
        {
            "type": "rect",
            "layer": "below",
            "xref": "x" if x in bounds else "paper",
            "yref": "y" if y in bounds else "paper",
            **_side("x", x, bounds.get(x), _largest(report, x)),
            **_side("y", y, bounds.get(y), _largest(report, y)),
            "fillcolor": SLO,
            "line": {"color": FRONT, "width": 1, "dash": "dot"},
        }
    ]


def _side(axis: str, metric: str, threshold: float | None, largest: float) -> dict[str, Json]:
    if threshold is None:
        return {f"{axis}0": 0, f"{axis}1": 1}
    if METRICS[metric].direction is Direction.MINIMIZE:
        return {f"{axis}0": 0, f"{axis}1": threshold}
    return {f"{axis}0": threshold, f"{axis}1": max(largest, threshold) * 1.1}


def _largest(report: StudyReport, metric: str) -> float:
    return max((metrics_of(trial).get(metric, 0.0) for trial in report.measured), default=0.0)


def _point_traces(report: StudyReport, cloud: Cloud, pair: tuple[str, str]) -> Iterator[dict[str, Json]]:
    xs, ys = cloud.pairs(*pair)
    if xs:
        marker: dict[str, Json] = {"color": _CLOUD, "size": 4}
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": "predicted",
            "x": list(xs),
            "y": list(ys),
            "marker": marker,
            "hoverinfo": "skip",
        }
    missed = [trial for trial in report.measured if not trial.feasible]
    if missed:
        yield _scatter(report, missed, pair, "misses an SLO", {"color": GREY, "symbol": "x", "size": 9})
    for mode in Mode:
        trials = [t for t in report.measured if t.feasible and t.candidate and t.candidate.config.mode is mode]
        if trials:
            yield _scatter(
                report, trials, pair, str(mode), {"color": COLOURS[mode], "symbol": _SYMBOLS[mode], "size": 10}
            )
    if report.front:
        ring: dict[str, Json] = {
            "color": "rgba(0,0,0,0)",
            "size": 17,
            "symbol": "circle",
            "line": {"color": FRONT, "width": 2.5},
        }
        yield _scatter(report, report.front, pair, "Pareto front", ring, bars=False)
    if set(pair) == set(report.objectives):  # with more objectives a line would claim an order that is not there
        yield _staircase(report, pair)


def _scatter(
    report: StudyReport,
    trials: Sequence[TrialRecord],
    pair: tuple[str, str],
    name: str,
    marker: dict[str, Json],
    *,
    bars: bool = True,
) -> dict[str, Json]:
    known = [trial for trial in trials if set(pair) <= set(metrics_of(trial))]
    values = [metrics_of(trial) for trial in known]
    errors: dict[str, Json] = {"error_x": _bars(report, known, pair[0]), "error_y": _bars(report, known, pair[1])}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [value[pair[0]] for value in values],
        "y": [value[pair[1]] for value in values],
        "marker": marker,
        "text": [_hover(report, trial) for trial in known],
        "hoverinfo": "text",
        **(errors if bars else {}),
    }


def _bars(report: StudyReport, trials: Sequence[TrialRecord], metric: str) -> dict[str, Json]:
    """The 95% intervals of `trials`; none where nothing says how much a figure varies."""
    found = [report.spreads.interval(trial, metric) for trial in trials]
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.mean if i else None for i in found],
        "arrayminus": [i.mean - i.low if i else None for i in found],
        "color": GREY,
        "thickness": 1,
        "width": 2,
        "visible": any(found),
    }


def _staircase(report: StudyReport, pair: tuple[str, str]) -> dict[str, Json]:
    """The edge of what the front dominates, by steps along x."""
    points = sorted((metrics_of(trial)[pair[0]], metrics_of(trial)[pair[1]]) for trial in report.front)
    # Going up in x, y gets worse first where a larger x is better: the step then comes before the point.
    shape = "vh" if METRICS[pair[0]].direction is Direction.MAXIMIZE else "hv"
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": FRONT, "width": 1.5, "shape": shape, "dash": "dot"},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _hover(report: StudyReport, trial: TrialRecord) -> str:
    candidate = trial.candidate
    lines = [f"<b>trial {trial.number}</b>{' (emulated)' if report.emulated else ''}"]
    if candidate is not None:
        lines += [f"{candidate.config.mode} at {candidate.load}, {candidate.config.devices} devices"]
        lines += html.escape(pools_text(candidate, separator="\n")).split("\n")
    metrics = metrics_of(trial)
    lines += [f"{name} = {number(metrics[name])}" for name in _HOVER_METRICS if name in metrics]
    return "<br>".join(lines)


def predicted_against_measured(report: StudyReport) -> tuple[Chart, ...]:
    """A chart for each objective: first runs against what was predicted before them."""
    return tuple(chart for metric in report.objectives if (chart := _prediction_chart(report, metric)) is not None)


def _prediction_chart(report: StudyReport, metric: str) -> Chart | None:
    known = [trial for trial in report.first_runs if trial.prediction and metric in trial.prediction.metrics]
    if not known:
        return None
    predicted = [trial.prediction.metrics[metric] for trial in known if trial.prediction]
    measured = [metrics_of(trial)[metric] for trial in known]
    span: list[Json] = [min(*predicted, *measured), max(*predicted, *measured)]
    exact: dict[str, Json] = {
        "type": "scatter",
        "mode": "lines",
        "name": "exact",
        "x": span,
        "y": span,
        "line": {"color": GREY, "width": 1, "dash": "dash"},
        "hoverinfo": "skip",
    }
    points: dict[str, Json] = {
        "type": "scatter",
        "mode": "markers",
        "name": "first runs",
        "x": list(predicted),
        "y": list(measured),
        "marker": {"color": [t.number for t in known], "colorscale": [[0, "#6fa3dc"], [1, "#e0602c"]], "size": 9},
        "text": [f"{_hover(report, t)}<br>predicted {number(p)}" for t, p in zip(known, predicted, strict=True)],
        "hoverinfo": "text",
    }
    layout = _layout(metric, metric)
    unit = METRICS[metric].unit
    layout |= {
        "xaxis": {"title": {"text": f"predicted before ({unit})"}, "automargin": True},
        "yaxis": {"title": {"text": f"measured ({unit})"}, "automargin": True},
        "showlegend": False,
    }
    return Chart(
        id=f"predicted-{metric}".replace("_", "-"),
        title=_plain(metric),
        caption="On the dashed line a prediction was exact; early trials are blue, late ones orange.",
        spec={"data": [exact, points], "layout": layout},
    )


def hypervolume_chart(report: StudyReport) -> Chart | None:
    """Hypervolume of the front over the device-hours spent by then; None before the first measurement."""
    history = hypervolume_history(report.trials, report.directions)
    if not history:
        return None
    by_number = {trial.number: trial for trial in report.trials}
    ends = [by_number[point.number].ended_at for point in history]
    order = [by_number[point.number] for point in history]
    hours, total = [], 0.0
    for trial in order:
        total += spent([trial], report.problem).device_hours
        hours.append(total)
    best = max(point.hypervolume for point in history) or 1.0
    line: dict[str, Json] = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "hypervolume",
        "x": list(hours),
        "y": [point.hypervolume / best for point in history],
        "line": {"color": COLOURS[Mode.AGGREGATED], "shape": "hv", "width": 2},
        "marker": {"size": 5},
        "text": [
            f"trial {p.number}, {p.finished} finished{f', {end:%Y-%m-%d %H:%M}' if end else ''}"
            for p, end in zip(history, ends, strict=True)
        ],
        "hoverinfo": "text+y",
    }
    layout: dict[str, Json] = {
        "margin": {"l": 62, "r": 14, "t": 10, "b": 52},
        "xaxis": {"title": {"text": "device-hours of finished trials"}, "rangemode": "tozero", "automargin": True},
        "yaxis": {"title": {"text": "hypervolume (1 = highest)"}, "rangemode": "tozero", "automargin": True},
        "showlegend": False,
    }
    return Chart(
        id="hypervolume",
        title="Hypervolume over device-hours",
        caption="How much of the objectives' space the front dominates. A curve that has been flat for long says that "
        "more search would find little; only a repeat can make it fall.",
        spec={"data": [line], "layout": layout},
    )
