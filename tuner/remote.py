"""Studies that run elsewhere: given to a cluster; their status, log and end from any machine with the storage."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from search_spaces.errors import TunerError

if TYPE_CHECKING:
    from cluster.ray_detached import DetachedProgram, Program, ProgramState
    from studies.lease_record import Event
    from studies.storage import Storage
    from tuner.places import Place
    from tuner.study_schema import StudyFile

FOLLOW_S = 1.0
BEGIN_LIMIT_S = 180.0
LEASE_WAIT_S = 180.0
"""How long a coordinator that was restarted waits for the lease of the one before, which may have died elsewhere."""

StorageOption = Annotated[
    str | None, typer.Option("--storage", help="Storage URL; TUNER_STORAGE or ./tuner-data by default.")
]
Name = Annotated[str, typer.Argument(help="Name of a study.")]


def add_commands(app: typer.Typer) -> None:
    """Add `status`, `logs` and `stop` to the commands of studies."""
    app.command("status")(status)
    app.command("logs")(logs)
    app.command("stop")(stop)


def status(
    name: Name,
    storage: StorageOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show who runs a study, its last heartbeat, its trials and the time left."""
    from studies.lease import read_lease
    from studies.storage import open_storage
    from tuner.places import existing_place
    from tuner.status import status_json, status_of, status_text
    from tuner.stored import find_history, stored_file

    place = existing_place(storage)
    opened = open_storage(place.url)
    require_known(opened, name)
    history = find_history(opened, name)
    budget = stored_file(history, place).budget if history else None
    trials = history.trials() if history else ()
    found = status_of(name, opened.url, trials, read_lease(opened, name), budget)
    print(json.dumps(status_json(found), indent=2) if as_json else status_text(found))


def logs(
    name: Name,
    storage: StorageOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the study is not run any more.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Only the last lines.")] = None,
) -> None:
    """Print what the coordinators of a study have written."""
    from studies.lease import is_free, read_lease
    from studies.storage import open_lease_book, open_storage
    from tuner.places import existing_place

    opened = open_storage(existing_place(storage).url)
    require_known(opened, name)
    book = open_lease_book(opened)
    events = book.events(name)
    _print_events(events if tail is None else events[len(events) - min(tail, len(events)) :])
    try:
        while follow:
            ended = is_free(read_lease(opened, name))
            new = book.events(name, after=events[-1].number if events else 0)
            _print_events(new)
            events = new or events
            if ended:
                return
            time.sleep(FOLLOW_S)
    except KeyboardInterrupt:
        return
    finally:
        book.close()


def stop(
    name: Name,
    storage: StorageOption = None,
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the end; 0 not to wait.")] = 120.0,
) -> None:
    """Order the coordinator of a study to stop, wherever it runs; what it has measured stays, and a resume goes on."""
    from studies.lease import is_free, order_stop, read_lease
    from studies.storage import open_storage
    from tuner.places import existing_place

    opened = open_storage(existing_place(storage).url)
    require_known(opened, name)
    record = order_stop(opened, name)
    print(f"Ordered {record.holder} to stop study {name}.")
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if is_free(read_lease(opened, name)):
            print(f"Stopped. Go on with: tuner study resume {name}")
            return
        time.sleep(min(FOLLOW_S, wait_s))
    if wait_s:
        raise TunerError(
            f"{record.holder} has not stopped study {name!r} within {wait_s:g} s; "
            f"look at it with: tuner study status {name}"
        )


def require_known(storage: Storage, name: str) -> None:
    """Raise `StudyNotFoundError` where the storage has neither the study nor a coordinator that is about to make it."""
    from studies.history import load_optuna_study
    from studies.lease import read_lease

    if read_lease(storage, name).record is None:
        load_optuna_study(storage, name)


def _print_events(events: list[Event]) -> None:
    for event in events:
        stamp = datetime.fromtimestamp(event.at_s, UTC).astimezone()
        print(f"{stamp:%Y-%m-%d %H:%M:%S} {event.text}", flush=True)


def detach(file: StudyFile, place: Place, address: str | None) -> None:
    """Run the study of `file` on the Ray cluster at `address`, and return when its coordinator holds the lease there.

    Raises `StudyBusyError` where it is run already, and `TunerError` where it does not begin.
    """
    from cluster.ray_session import connect
    from studies.lease import require_free
    from studies.storage import open_storage
    from tuner.session import check_space

    if address is None:
        raise TunerError(
            "--detach needs a Ray cluster that goes on when this command ends; give its address with --address or "
            "RAY_ADDRESS (auto for the one that runs on this machine)"
        )
    storage = open_storage(place.url)
    require_free(storage, file.name)
    problem, _ = check_space(file)
    with connect(address, problem.node_pools) as cluster:
        from cluster.ray_detached import start_detached

        program = start_detached(_program(file, place, cluster.address), on_this_node=place.file is not None)
        print("Waiting for the coordinator ...", file=sys.stderr)
        state = _wait_until_begun(program, storage, file.name)
    _say_detached(file, place, state)


def _program(file: StudyFile, place: Place, address: str) -> Program:
    from cluster.ray_detached import Program
    from tuner.places import DATA_VARIABLE, STORAGE_VARIABLE
    from tuner.session import LEASE_EXPIRY_VARIABLE, LEASE_WAIT_VARIABLE, lease_times
    from tuner.study_file import dump_study

    base = place.coordinator(file.name)
    study_file = str(base.with_suffix(".yaml"))
    mark = hashlib.sha256(place.absolute_url.encode()).hexdigest()[:8]
    return Program(
        name=f"coordinator of {file.name} ({mark})",
        arguments=("-m", "tuner.cli", "study", "run", study_file, "--address", address, "--no-progress"),
        log=str(base.with_suffix(".log")),
        files={study_file: dump_study(file)},
        environment={
            STORAGE_VARIABLE: place.absolute_url,
            DATA_VARIABLE: str(place.directory),
            LEASE_EXPIRY_VARIABLE: f"{lease_times().expiry_s:g}",
            LEASE_WAIT_VARIABLE: f"{LEASE_WAIT_S:g}",
        },
    )


def _wait_until_begun(program: DetachedProgram, storage: Storage, study: str) -> ProgramState:
    """The program's state once it holds the study's lease, or has ended well before it was seen to."""
    from studies.lease import is_free, read_lease
    from studies.redaction import redacted

    deadline = time.monotonic() + BEGIN_LIMIT_S
    while time.monotonic() < deadline:
        state = program.state()
        if state is None or state.exit_code not in (None, 0):
            tail = redacted(state.tail) if state else "its actor is gone; look at the cluster's nodes"
            raise TunerError(f"the coordinator of study {study!r} ended at once:\n{tail}")
        if state.exit_code == 0 or not is_free(read_lease(storage, study)):
            return state
        time.sleep(FOLLOW_S)
    raise TunerError(
        f"the coordinator of study {study!r} did not begin within {BEGIN_LIMIT_S:g} s; look at its cluster"
    )


def _say_detached(file: StudyFile, place: Place, state: ProgramState) -> None:
    name = file.name
    begun = "has ended" if state.exit_code == 0 else "runs"
    print(
        f"Study {name} {begun} detached: process {state.pid} on host {state.host}.\n"
        f"  its files         {place.directory} on that host\n"
        f"  how it stands     tuner study status {name}\n"
        f"  what it does      tuner study logs {name} -f\n"
        f"  end it            tuner study stop {name}\n"
        "From any machine with the storage (TUNER_STORAGE or --storage)."
    )
