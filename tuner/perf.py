"""`tuner perf`: operation tables and how right predictions from them are: validate, show, import, collect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli_options import AsJson, Overrides

if TYPE_CHECKING:
    from rich.console import Console

perf_app = typer.Typer(help="Operation tables of the performance model, and how right it is.", no_args_is_help=True)

TablesOption = Annotated[
    Path | None, typer.Option("--tables", help="Directory of operation tables; the installed public ones by default.")
]


@perf_app.command("validate")
def validate(
    measurements: Annotated[Path, typer.Option(help="CSV file of measured runs.")],
    calibration: Annotated[str, typer.Option(help="none, shipped, or the file of a prior.")] = "shipped",
    tables: TablesOption = None,
    predictions: Annotated[
        Path | None, typer.Option(help="CSV file to write: id, ttft_ms, tpot_ms of every predicted row.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold predictions against measured runs: coverage, and errors of TTFT and TPOT by engine, system and model."""
    from perf_model.validate import validate as compare
    from perf_model.validate import write_predictions
    from tuner.perf_report import show_validation, validation_json
    from tuner.table_places import silicon_at
    from tuner.wiring import chosen_prior

    prior = chosen_prior(calibration)
    silicon = silicon_at(tables)
    found = compare(measurements, silicon, correct=None if prior is None else prior.correct)
    if predictions is not None:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(found, predictions)
    if as_json:
        print(json.dumps(validation_json(found, calibration), indent=2, ensure_ascii=False))
    else:
        show_validation(found, calibration, _console())


@perf_app.command("show")
def show(
    tables: TablesOption = None,
    system: Annotated[str | None, typer.Option(help="One system, such as h200_sxm.")] = None,
    engine: Annotated[str | None, typer.Option(help="One engine, such as vllm.")] = None,
    html: Annotated[Path | None, typer.Option(help="HTML file to write, with plots of utilisation.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what tables hold: rows by family and their ranges; with --html how well the hardware is used."""
    from tuner.table_places import table_roots
    from tuner.table_survey import coverage, coverage_json, show_coverage

    roots = table_roots(tables)
    found = [row for root in roots for row in coverage(root, system, engine)]
    if as_json:
        print(json.dumps(coverage_json(found), indent=2, ensure_ascii=False))
    else:
        show_coverage(found, roots, _console())
    if html is not None:
        from tuner.table_plots import write_plots

        print(f"Plots: {write_plots(roots, found, html)}")


@perf_app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(help="Directory of the layout <dir>/data/<system>/<family>/...")],
    to: Annotated[
        Path | None, typer.Option(help="Where to; TUNER_TABLES or ~/.local/share/tuner/tables by default.")
    ] = None,
) -> None:
    """Check a directory of operation tables and copy it to where predictions look for your own tables."""
    from tuner.table_import import import_tables
    from tuner.table_places import own_root

    done = import_tables(directory, to or own_root())
    print(f"Imported {done.files} tables ({done.rows:,} rows) of {', '.join(done.systems)} to {done.target}")
    print(f"Provenance: {done.provenance}")
    if to is not None and to.expanduser().resolve() != own_root().expanduser().resolve():
        print(f"Predictions look there where TUNER_TABLES={to} is set.")


@perf_app.command("collect")
def collect(
    file: Annotated[
        Path | None, typer.Argument(help="Study file; the small model on this machine without one.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to join; this machine by default.")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="One node pool of the study file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to; TUNER_TABLES or ~/.local/share/tuner/tables by default.")
    ] = None,
    families: Annotated[
        str | None,
        typer.Option(help="steps (CPU nodes); gemm,attention,memory,collectives (GPU nodes); all by default."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Default options and fewer shapes only.")] = False,
    overrides: Overrides = None,
) -> None:
    """Measure operation tables on the nodes of a cluster; what was measured before is kept, and not measured again."""
    from tuner.collect_view import CollectView
    from tuner.collecting import LOCAL_STUDY, Wanted
    from tuner.collecting import collect as measure
    from tuner.study_file import load_study_file, parse_study
    from tuner.table_places import own_root

    given = list(overrides or [])
    study = parse_study(LOCAL_STUDY, given) if file is None else load_study_file(file, given)
    root = (out or own_root()).expanduser().resolve()
    names = tuple(name.strip() for name in families.split(",")) if families else ()
    wanted = Wanted(study=study, root=root, families=names, pool=pool, quick=quick)
    with CollectView() as view:
        done = measure(wanted, address, view.tell, view.advance)
    for row in done:
        print(f"{row.pool}: {row.measured} points measured, {row.found} were there; system {row.system}")
    print(f"Tables: {root}")
    if root == own_root().expanduser().resolve():
        print("tuner predict and tuner study run use them from now on.")
    else:
        print(f"tuner predict and tuner study run use them where TUNER_TABLES={root} is set.")


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False)
