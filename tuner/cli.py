"""The commands. Heavy modules are imported by the command that needs them, so that `--help` answers at once."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search_spaces.errors import TunerError
from tuner.campaigns.cli import campaign_app
from tuner.cli_options import Address, AsJson, Detach, FileStorageOption, NoProgress, Overrides, StorageOption
from tuner.compare_cli import compare_command
from tuner.config_cli import config_app, profiles_app
from tuner.deploy.command import bench, confirm, deploy
from tuner.importance import importance_command
from tuner.perf import perf_app
from tuner.plan_cli import plan_command
from tuner.prediction import predict
from tuner.remote import add_commands
from tuner.report_cli import report_command
from tuner.score_cli import rescore
from tuner.serve.command import serve
from tuner.whatif_cli import whatif

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.places import Place
    from tuner.report import StudyReport
    from tuner.session import Ended
    from tuner.study_schema import StudyFile

app = typer.Typer(
    help="Finds the best way to serve a large language model on a cluster, by measuring.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(help="Run studies and look at what they found.", no_args_is_help=True)
add_commands(study_app)
study_app.command("rescore")(rescore)
study_app.command("compare")(compare_command)
study_app.command("importance")(importance_command)
study_app.command("report")(report_command)
app.add_typer(study_app, name="study")
app.add_typer(campaign_app, name="campaign")
app.add_typer(perf_app, name="perf")
app.add_typer(config_app, name="config")
app.add_typer(profiles_app, name="profiles")
app.command("predict")(predict)
app.command("plan")(plan_command)
app.command("whatif")(whatif)
study_app.command("confirm")(confirm)
app.command("deploy")(deploy)
app.command("bench")(bench)
app.command("serve")(serve)

Name = Annotated[str, typer.Argument(help="Name of a study.")]


def main() -> None:
    """Entry point: an error that the user can mend is one message on stderr and exit code 2, or a code of its own."""
    try:
        app()
    except TunerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"tuner {version('tuner')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


@study_app.command("run")
def run(
    file: Annotated[Path, typer.Argument(help="A study file (YAML).")],
    address: Address = None,
    overrides: Overrides = None,
    storage: FileStorageOption = None,
    as_json: AsJson = False,
    no_progress: NoProgress = False,
    detached: Detach = False,
) -> None:
    """Run the study of FILE, or all of its experiments; what was begun before goes on where it stopped."""
    from tuner.experiments_run import Options, experiments_of, run_all
    from tuner.remote import detach
    from tuner.study_file import load_study_file

    names = experiments_of(file, overrides or [])
    if names:
        if as_json:
            raise TunerError("--json tells one study; pick one with --set experiment=NAME, or compare them as JSON")
        options = Options(address=address, overrides=tuple(overrides or ()), storage=storage, detached=detached)
        _end_of_all(run_all(file, names, options))
        return
    study = load_study_file(file, overrides or [])
    if detached:
        detach(study, _place(study, storage), address)
        return
    _run(study, _place(study, storage), address=address, as_json=as_json, no_progress=no_progress)


@study_app.command("resume")
def resume(
    study: Annotated[str, typer.Argument(help="Name of a study, or its study file.")],
    address: Address = None,
    overrides: Overrides = None,
    storage: FileStorageOption = None,
    as_json: AsJson = False,
    no_progress: NoProgress = False,
    detached: Detach = False,
) -> None:
    """Go on with a study that was stopped, or whose budget is raised (--set budget.trials=40)."""
    from tuner.remote import detach
    from tuner.stored import history_of, stored_file
    from tuner.study_file import load_study_file

    if Path(study).suffix in {".yaml", ".yml"}:
        file = load_study_file(Path(study), overrides or [])
        place = _place(file, storage)
        history_of(place, file.name)
    else:
        place = _existing(storage)
        file = stored_file(history_of(place, study), place, overrides or [])
    if detached:
        detach(file, place, address)
        return
    _run(file, place, address=address, as_json=as_json, no_progress=no_progress)


@study_app.command("list")
def list_studies(storage: StorageOption = None, as_json: AsJson = False) -> None:
    """List the studies of a storage."""
    from studies.history import summaries
    from studies.storage import open_storage
    from tuner.report import summaries_json, summaries_table

    found = summaries(open_storage(_existing(storage).url))
    _print(summaries_json(found)) if as_json else _console().print(summaries_table(found))


@study_app.command("show")
def show(name: Name, storage: StorageOption = None, as_json: AsJson = False) -> None:
    """Show a study: counts, best trials, failures with the engine's last lines, and how good the model is."""
    from tuner import report

    found = _report(name, storage)
    _print(report.show_json(found)) if as_json else _console().print(report.show(found))


@study_app.command("pareto")
def pareto(
    name: Name,
    storage: StorageOption = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Show the Pareto front of a study."""
    from tuner import report

    found = _report(name, storage)
    if as_json:
        _print(report.front_json(found))
    elif as_csv:
        print(report.front_csv(found), end="")
    else:
        _console().print(report.front_table(found))


@app.command("dashboard")
def dashboard(
    storage: StorageOption = None,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 for a free one.", min=0, max=65535)] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Open optuna-dashboard on the storage."""
    from studies.dashboard import open_dashboard
    from studies.storage import open_storage

    place = _existing(storage)
    with open_dashboard(open_storage(place.url), place.artifacts, host=host, port=port) as server:
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores SIGINT for what it starts in the background
            signal.signal(number, signal.default_int_handler)
        print(f"Dashboard: http://{host}:{server.server_port}/  (Ctrl-C to end)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Dashboard ended.", file=sys.stderr)


def _run(study: StudyFile, place: Place, *, address: str | None, as_json: bool, no_progress: bool) -> None:
    """Run `study`, show its front, and exit with 130 or 143 where it was interrupted."""
    from tuner.log import warnings_to
    from tuner.progress import LineProgress, LiveProgress
    from tuner.session import run_study
    from tuner.signals import StopRequest
    from tuner.wiring import connector

    stop = StopRequest()
    console = _console(stderr=True)
    view = LiveProgress if console.is_terminal and not no_progress else LineProgress
    try:
        with view(console) as observer, warnings_to(observer.note):
            ended = run_study(study, place, connect=connector(address, study), stop=stop, observer=observer)
    except KeyboardInterrupt:
        print("Interrupted. Nothing that was measured is lost; the same command goes on.", file=sys.stderr)
        raise typer.Exit(130) from None
    _show_end(ended, place, as_json=as_json)
    if ended.reason is None:
        print(f"Stopped. Nothing that was measured is lost; {_how_to_resume(study)}", file=sys.stderr)
        raise typer.Exit(128 + (stop.signal_number or signal.SIGTERM))


def _end_of_all(codes: dict[str, int]) -> None:
    """Say how the experiments ended; exits with the largest code."""
    for name, code in codes.items():
        print(f"experiment {name}: {'done' if code == 0 else f'ended with exit code {code}'}", file=sys.stderr)
    if any(codes.values()):
        raise typer.Exit(max(codes.values()))
    print("Compare them with: tuner study compare NAME, the name of the study file.", file=sys.stderr)


def _how_to_resume(study: StudyFile) -> str:
    """The command that goes on; a storage URL with a password is not repeated."""
    from studies.redaction import redacted

    named = "storage" in study.model_fields_set and redacted(study.storage) == study.storage
    return f"go on with: tuner study resume {study.name}{f' --storage {study.storage}' if named else ''}"


def _show_end(ended: Ended, place: Place, *, as_json: bool) -> None:
    """The front on stdout and as HTML; why the search ended on stderr."""
    from tuner import report
    from tuner.report_html import write_front

    name = ended.report.name
    path = write_front(ended.report, place.reports(name) / "front.html", place.predictions(name))
    if ended.reason is not None:
        print(f"The search ended: {ended.reason}.", file=sys.stderr)
    if as_json:
        _print(report.front_json(ended.report))
    else:
        _console().print(report.front_table(ended.report))
    print(f"Report: {path}", file=sys.stderr)


def _place(study: StudyFile, storage: str | None) -> Place:
    from tuner.places import find_place

    named = study.storage if "storage" in study.model_fields_set else None
    return find_place(storage or named)


def _existing(storage: str | None) -> Place:
    from tuner.places import existing_place

    return existing_place(storage)


def _report(name: str, storage: str | None) -> StudyReport:
    from tuner.stored import history_of, make_report, stored_file

    place = _existing(storage)
    history = history_of(place, name)
    return make_report(history, stored_file(history, place))


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False)


def _print(tree: object) -> None:
    print(json.dumps(tree, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
