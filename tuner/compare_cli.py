"""`tuner study compare A B C`: fronts over each other, hypervolumes, the best under each SLO, and what is noise."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli_options import AsJson, StorageOption

if TYPE_CHECKING:
    from studies.history import StudyHistory
    from tuner.places import Place


def compare_command(
    names: Annotated[list[str], typer.Argument(help="Studies; one with experiments stands for all of them.")],
    by: Annotated[list[str] | None, typer.Option("--by", help="Objectives; those of the first study.")] = None,
    slos: Annotated[
        list[str] | None, typer.Option("--slo", help="Change an SLO of the first study: METRIC=THRESHOLD, METRIC=none.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Where to write the page.")] = None,
    storage: StorageOption = None,
    as_json: AsJson = False,
) -> None:
    """Compare studies of a storage by what they measured; prints tables and writes a page."""
    from tuner.compare_causes import explained, questions
    from tuner.compare_html import write_comparison
    from tuner.compare_report import comparison_json, shown
    from tuner.comparison import compare
    from tuner.places import existing_place
    from tuner.score_cli import with_slos
    from tuner.stored import make_report, stored_file
    from tuner.wiring import make_problem

    place = existing_place(storage)
    histories = histories_of(place, names)
    reports = [make_report(history, stored_file(history, place)) for history in histories]
    held = make_problem(with_slos(histories[0], place, slos or [])).slos
    found = compare(reports, objectives=by, slos=held)
    causes = explained(found, {history.name: history for history in histories}, place)
    asked = questions(histories, place)
    target = html or place.reports(f"compare-{'-'.join(found.names)}"[:120]) / "compare.html"
    path = write_comparison(found, causes, asked, target)
    if as_json:
        print(json.dumps(comparison_json(found, causes, asked), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(markup=False, highlight=False)
        for part in shown(found, causes, asked):
            console.print(part, soft_wrap=isinstance(part, str))
    print(f"Report: {path}", file=sys.stderr)


def histories_of(place: Place, names: Sequence[str]) -> tuple[StudyHistory, ...]:
    """The stored studies called `names`; a name that only has experiments (`NAME.x`) stands for all of these.

    Raises `StudyNotFoundError` for a name that is neither.
    """
    from studies.history import StudyHistory, study_names
    from studies.storage import open_storage

    storage = open_storage(place.url)
    known = study_names(storage)
    found: dict[str, None] = {}
    for name in names:
        parts = [other for other in known if other.startswith(f"{name}.")]
        found |= dict.fromkeys(parts if parts and name not in known else [name])
    return tuple(StudyHistory(storage, name) for name in found)
