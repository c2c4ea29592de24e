"""What the service tells of studies: lists, fronts, status, logs, reports, and events as they happen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse

from studies.history import our_names
from studies.lease import is_free, read_events, read_lease
from tuner import report
from tuner.remote import require_known
from tuner.report_html import report_html
from tuner.report_markdown import report_markdown
from tuner.report_story import report_json
from tuner.serve.answers import Front, Line, Report, Status, Study, Summary
from tuner.serve.context import (
    GATE,
    GUARDED,
    NOT_FOUND,
    Name,
    Responses,
    TheService,
    as_json,
    report_of,
    told,
)
from tuner.serve.following import Streams, event_json, followed_lines, followed_trials, status_of_study
from tuner.status import status_json

_REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads allow-popups; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""A report is a file with its scripts inside. Sandboxed, it belongs to no origin, and can ask this service nothing."""

router = APIRouter(prefix="/api/v1", tags=["studies"], dependencies=GATE, responses=GUARDED)
streams = Streams()
After = Annotated[int, Query(ge=0, le=2**31, description="Only lines behind this number.")]
_STREAM: Responses = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "description": "one event; its data is JSON",
                    "required": ["data"],
                    "properties": {key: {"type": "string"} for key in ("event", "data", "id")},
                }
            }
        }
    },
    429: told("too many are followed at once; end another, or try again"),
}


class CsvResponse(PlainTextResponse):
    """Text of comma-separated values."""

    media_type = "text/csv"


class MarkdownResponse(PlainTextResponse):
    """Text of Markdown."""

    media_type = "text/markdown"


class EventResponse(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"


@router.get("/studies", response_model=list[Summary])
def studies(service: TheService) -> JSONResponse:
    """The studies of the storage."""
    found = [service.history(name).summary() for name in our_names(service.storage)]
    told = report.summaries_json(found)
    running = (not is_free(read_lease(service.storage, summary.name)) for summary in found)
    rows = told if isinstance(told, list) else []
    return as_json([{**row, "running": runs} for row, runs in zip(rows, running, strict=True) if isinstance(row, dict)])


@router.get("/studies/{name}", response_model=Study, responses=NOT_FOUND)
def study(service: TheService, name: Name) -> JSONResponse:
    """A study with every trial: what `tuner study show --json` prints."""
    return as_json(report.show_json(report_of(service, name)))


@router.get("/studies/{name}/front", response_model=Front, responses=NOT_FOUND)
def front(service: TheService, name: Name) -> JSONResponse:
    """The Pareto front: what `tuner study pareto --json` prints."""
    return as_json(report.front_json(report_of(service, name)))


@router.get("/studies/{name}/front.csv", responses=NOT_FOUND, response_class=CsvResponse)
def front_csv(service: TheService, name: Name) -> CsvResponse:
    """The Pareto front as CSV."""
    return CsvResponse(report.front_csv(report_of(service, name)))


@router.get("/studies/{name}/report", responses=NOT_FOUND, response_class=HTMLResponse)
def report_page(service: TheService, name: Name) -> HTMLResponse:
    """The report as one HTML file, with its charts inside."""
    page = report_html(report_of(service, name), service.place.predictions(name))
    headers = {
        "Content-Security-Policy": _REPORT_POLICY,
        "Content-Disposition": f'inline; filename="{name}.html"',
    }
    return HTMLResponse(page, headers=headers)


@router.get("/studies/{name}/report.json", response_model=Report, responses=NOT_FOUND)
def report_tree(service: TheService, name: Name) -> JSONResponse:
    """The report for programs: what `tuner study report --json` prints."""
    return as_json(report_json(report_of(service, name)))


@router.get("/studies/{name}/report.md", responses=NOT_FOUND, response_class=MarkdownResponse)
def report_text(service: TheService, name: Name) -> MarkdownResponse:
    """The report as Markdown: what `tuner study report --markdown` prints."""
    return MarkdownResponse(report_markdown(report_of(service, name)))


@router.get("/studies/{name}/status", response_model=Status, responses=NOT_FOUND)
def status(service: TheService, name: Name) -> JSONResponse:
    """Who runs a study, its last heartbeat, its trials and the time left."""
    return as_json(status_json(status_of_study(service, name)))


@router.get("/studies/{name}/events", response_model=list[Line], responses=NOT_FOUND)
def events(service: TheService, name: Name, after: After = 0) -> JSONResponse:
    """What the coordinators of a study have written, line by line."""
    require_known(service.storage, name)
    return as_json([event_json(event) for event in read_events(service.storage, name, after)])


@router.get("/studies/{name}/events/stream", responses=NOT_FOUND | _STREAM, response_class=EventResponse)
def stream(request: Request, service: TheService, name: Name, after: After = 0) -> EventResponse:
    """Server-sent events: each line as it is written, and `event: end` when nobody runs the study any more."""
    require_known(service.storage, name)
    return _followed(followed_lines(request, service, name, after))


@router.get("/studies/{name}/trials/stream", responses=NOT_FOUND | _STREAM, response_class=EventResponse)
def trials(request: Request, service: TheService, name: Name) -> EventResponse:
    """Server-sent events: `trial` (Progress), `front` (Points) and `status`, all at first and then as they change.

    `end` comes when nobody runs the study any more, `fault` where the storage cannot be read.
    """
    require_known(service.storage, name)
    return _followed(followed_trials(request, service, name))


def _followed(events: AsyncIterator[str]) -> EventResponse:
    streams.require_room()

    async def counted() -> AsyncIterator[str]:
        with streams.one_more():
            async for event in events:
                yield event

    return EventResponse(counted())
