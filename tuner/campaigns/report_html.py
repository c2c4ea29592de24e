"""The report of a campaign as one self-contained HTML file, with the style and the charts of study reports."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader

from studies.codec import Json
from studies.pareto import hypervolume_history
from studies.spending import spent
from tuner.campaigns.report import (
    FIGURES,
    HEADINGS,
    SLICE_HEADINGS,
    CampaignStory,
    Chapter,
    row_of,
    slice_row,
)
from tuner.campaigns.standing import Standing, failures
from tuner.campaigns.status import spent_text
from tuner.report_figures import Chart, operating_points
from tuner.report_html import PARTS, part

COLOURS = ("#2f7ed8", "#e07b39", "#2a9d5c", "#9b59b6", "#c0392b", "#16a085", "#b7950b", "#7f8c8d")
DASHES = ("solid", "dash", "dot", "dashdot")


def write_campaign(told: CampaignStory, path: Path) -> Path:
    """Write the page to `path`, making its folder, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(campaign_html(told), encoding="utf-8")
    return path


def campaign_html(told: CampaignStory) -> str:
    """The whole page."""
    money = [chart for chart in (_growth(told), _spending(told)) if chart is not None]
    fronts = [(chapter, _front(chapter, index)) for index, chapter in enumerate(told.chapters)]
    charts = [*money, *(chart for _, chart in fronts if chart is not None)]
    environment = Environment(loader=PackageLoader("tuner", "templates/campaign"), autoescape=True)
    return environment.get_template("page.html.j2").render(
        told=told,
        name=told.view.campaign.name,
        state=told.status.state,
        spent=spent_text(told.view),
        money=money,
        fronts=fronts,
        headings=list(zip(HEADINGS, FIGURES, strict=True)),
        rows=[list(zip(row_of(chapter), FIGURES, strict=True)) for chapter in told.chapters],
        slice_headings=SLICE_HEADINGS,
        slices=[slice_row(slice_) for slice_ in told.view.memory.slices],
        failures=failures(told.view.standings),
        measured=sum(standing.measured for standing in told.view.standings),
        closed=sum(not standing.is_open for standing in told.view.standings),
        specs={chart.id: chart.spec for chart in charts},
        parts={name: part(name) for name in PARTS},
    )


def _growth(told: CampaignStory) -> Chart | None:
    """The hypervolume of every study over its own device-hours."""
    traces: list[Json] = []
    for index, standing in enumerate(told.view.standings):
        hours, volumes = _growth_of(standing)
        if volumes:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": html.escape(standing.record.study),
                    "x": hours,
                    "y": volumes,
                    "line": {"shape": "hv", "width": 2, **_style(index)},
                    "marker": {"size": 5},
                    "hoverinfo": "name+x+y",
                    "hoverlabel": {"namelength": -1},
                }
            )
    layout = _layout("device-hours of the study", "hypervolume (1 = highest of the study)")
    caption = "How much of its objectives' space the front of each study dominates. Each is measured by itself."
    return _chart("growth", "What each study gained", caption, traces, layout)


def _growth_of(standing: Standing) -> tuple[list[Json], list[Json]]:
    points = hypervolume_history(standing.trials, standing.directions)
    best = max((point.hypervolume for point in points), default=0.0) or 1.0
    numbered = {trial.number: trial for trial in standing.trials}
    hours: list[Json] = []
    total = 0.0
    for point in points:
        total += spent([numbered[point.number]], standing.problem).device_hours
        hours.append(total)
    return hours, [point.hypervolume / best for point in points]


def _spending(told: CampaignStory) -> Chart | None:
    """Slices in their order: what each took."""
    ended = [slice_ for slice_ in told.view.memory.slices if slice_.end is not None]
    traces: list[Json] = [
        {
            "type": "bar",
            "name": html.escape(standing.cell.name),
            "x": [slice_.number for slice_ in ended if slice_.cell == standing.cell.name],
            "y": [slice_.end.device_hours for slice_ in ended if slice_.cell == standing.cell.name and slice_.end],
            "marker": {"color": COLOURS[index % len(COLOURS)]},
            "text": [html.escape(slice_.why) for slice_ in ended if slice_.cell == standing.cell.name],
            "textposition": "none",
            "hoverinfo": "name+y+text",
            "hoverlabel": {"namelength": -1},
        }
        for index, standing in enumerate(told.view.standings)
    ]
    layout = _layout("slice", "device-hours") | {"barmode": "stack"}
    return _chart(
        "spending", "Where the budget went", "One bar for each slice, in their order.", traces if ended else [], layout
    )


def _front(chapter: Chapter, index: int) -> Chart | None:
    """The first operating-points chart of the study's own report, under an id of its own."""
    charts = operating_points(chapter.report) if chapter.report is not None else ()
    return replace(charts[0], id=f"front-{index}") if charts else None


def _style(index: int) -> dict[str, Json]:
    return {"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index // len(COLOURS) % len(DASHES)]}


def _layout(x: str, y: str) -> dict[str, Json]:
    return {
        "margin": {"l": 62, "r": 14, "t": 10, "b": 52},
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0},
        "xaxis": {"title": {"text": x}, "rangemode": "tozero", "automargin": True},
        "yaxis": {"title": {"text": y}, "rangemode": "tozero", "automargin": True},
    }


def _chart(ident: str, title: str, caption: str, traces: list[Json], layout: dict[str, Json]) -> Chart | None:
    if not traces:
        return None
    return Chart(id=ident, title=title, caption=caption, spec={"data": traces, "layout": layout})
