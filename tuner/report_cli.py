"""`tuner study report STUDY`: the report as HTML, Markdown or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from search_spaces.errors import InvalidValueError
from tuner.cli_options import StorageOption

if TYPE_CHECKING:
    from tuner.report import StudyReport


def report_command(
    name: Annotated[str, typer.Argument(help="Name of a study.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File to write; reports/STUDY/front.html beside the storage by default."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Markdown, on stdout without --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, on stdout without --out.")] = False,
    storage: StorageOption = None,
) -> None:
    """Write the report of a study: one HTML file that opens without a network, or Markdown or JSON."""
    from tuner.places import existing_place
    from tuner.report_html import write_front
    from tuner.stored import history_of, make_report, stored_file

    if as_markdown and as_json:
        raise InvalidValueError("--markdown and --json were given; choose one")
    place = existing_place(storage)
    history = history_of(place, name)
    report = make_report(history, stored_file(history, place))
    if as_markdown or as_json:
        put(report_text(report, "markdown" if as_markdown else "json"), out)
        return
    path = write_front(report, out or place.reports(name) / "front.html", place.predictions(name))
    print(f"Report: {path}")


def report_text(report: StudyReport, form: Literal["html", "markdown", "json"], predictions: Path | None = None) -> str:
    """The report as text that ends with a line; `predictions` is the folder of what the screen turned down."""
    from tuner.report_html import report_html
    from tuner.report_markdown import report_markdown
    from tuner.report_story import report_json

    if form == "html":
        return report_html(report, predictions)
    text = (
        report_markdown(report) if form == "markdown" else json.dumps(report_json(report), indent=2, ensure_ascii=False)
    )
    return text.rstrip("\n") + "\n"


def put(text: str, out: Path | None) -> None:
    """`text` to the file `out`, or to standard output where there is none."""
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"Report: {out}")
