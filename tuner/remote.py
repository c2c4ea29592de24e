"""Studies that run elsewhere: given to a cluster; their status, log and end from any machine with the storage.

What is the same for campaigns takes a `Job`; how a coordinator gets to a cluster is in `tuner.detached`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from search_spaces.errors import TunerError
from tuner.cli_options import AsJson, Follow, StorageOption, Tail, WaitS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from studies.coordinator import Coordinator
    from studies.lease_record import Event
    from studies.storage import Storage
    from tuner.places import Place
    from tuner.study_schema import StudyFile

FOLLOW_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a coordinator runs, as commands name it: `kind` is study or campaign; `lease` is the name of its lease."""

    kind: str
    name: str
    lease: str

    @classmethod
    def study(cls, name: str) -> Job:
        """A study has the lease of its name."""
        return cls(kind="study", name=name, lease=name)


Name = Annotated[str, typer.Argument(help="Name of a study.")]


def add_commands(app: typer.Typer) -> None:
    """Add `status`, `logs` and `stop` to the commands of studies."""
    app.command("status")(status)
    app.command("logs")(logs)
    app.command("stop")(stop)


def status(name: Name, storage: StorageOption = None, as_json: AsJson = False) -> None:
    """Show who runs a study, its last heartbeat, its trials and the time left."""
    from studies.storage import open_storage
    from tuner.places import existing_place
    from tuner.status import status_json, status_text, stored_status
    from tuner.stored import find_history

    place = existing_place(storage)
    opened = open_storage(place.url)
    require_known(opened, name)
    found = stored_status(opened, place, name, find_history(opened, name))
    print(json.dumps(status_json(found), indent=2) if as_json else status_text(found))


def logs(
    name: Name,
    storage: StorageOption = None,
    follow: Follow = False,
    tail: Tail = None,
) -> None:
    """Print what the coordinators of a study have written."""
    from studies.storage import open_storage
    from tuner.places import existing_place

    opened = open_storage(existing_place(storage).url)
    require_known(opened, name)
    print_log(opened, Job.study(name), follow=follow, tail=tail)


def stop(
    name: Name,
    storage: StorageOption = None,
    wait_s: WaitS = 120.0,
) -> None:
    """Order the coordinator of a study to stop, wherever it runs; what it has measured stays, and a resume goes on."""
    from studies.storage import open_storage
    from tuner.places import existing_place

    opened = open_storage(existing_place(storage).url)
    require_known(opened, name)
    stop_and_wait(opened, Job.study(name), wait_s)


def require_known(storage: Storage, name: str) -> None:
    """Raise `StudyNotFoundError` where the storage has neither the study nor a coordinator that is about to make it."""
    from studies.history import load_optuna_study
    from studies.lease import read_lease

    if read_lease(storage, name).record is None:
        load_optuna_study(storage, name)


def print_log(storage: Storage, job: Job, *, follow: bool, tail: int | None) -> None:
    """Print what those who ran `job` have written, or the `tail` of it; with `follow` until nobody runs it any more."""
    from studies.lease import is_free, read_events, read_lease

    events = read_events(storage, job.lease)
    _print_events(events if tail is None else events[len(events) - min(tail, len(events)) :])
    try:
        while follow:
            ended = is_free(read_lease(storage, job.lease))  # before the lines, so that the last are not missed
            new = read_events(storage, job.lease, after=events[-1].number if events else 0)
            _print_events(new)
            events = new or events
            if ended:
                return
            time.sleep(FOLLOW_S)
    except KeyboardInterrupt:
        return


def _print_events(events: Sequence[Event]) -> None:
    for event in events:
        stamp = datetime.fromtimestamp(event.at_s, UTC).astimezone()
        print(f"{stamp:%Y-%m-%d %H:%M:%S} {event.text}", flush=True)


def stop_and_wait(storage: Storage, job: Job, wait_s: float) -> None:
    """Order whoever runs `job` to stop, and wait until nobody does.

    Raises `StudyNotFoundError` where nobody runs it, and `TunerError` where it goes on after `wait_s` (0: it is not
    waited for).
    """
    from studies.lease import is_free, read_lease

    holder = _ordered_to_stop(storage, job)
    print(f"Ordered {holder} to stop {job.kind} {job.name}.")
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if is_free(read_lease(storage, job.lease)):
            print(f"Stopped. Go on with: tuner {job.kind} resume {job.name}")
            return
        time.sleep(min(FOLLOW_S, wait_s))
    if wait_s:
        raise TunerError(
            f"{holder} has not stopped {job.kind} {job.name!r} within {wait_s:g} s; "
            f"look at it with: tuner {job.kind} status {job.name}"
        )


def _ordered_to_stop(storage: Storage, job: Job) -> Coordinator | None:
    from studies.errors import StudyNotFoundError
    from studies.lease import order_stop

    try:
        return order_stop(storage, job.lease).holder
    except StudyNotFoundError as error:
        raise StudyNotFoundError(f"nobody runs {job.kind} {job.name!r}; there is nothing to stop") from error


def detach(file: StudyFile, place: Place, address: str | None) -> None:
    """Run the study of `file` on the Ray cluster at `address`, and return when its coordinator holds the lease there.

    Raises `StudyBusyError` where it is run already, `StudyFileChangedError` where it was made with another study file,
    and `TunerError` where it does not begin.
    """
    from rich.console import Console

    from studies.lease import require_free
    from studies.storage import open_storage
    from tuner import detached
    from tuner.progress import LineProgress
    from tuner.session import check_same_question, check_space
    from tuner.stored import find_history
    from tuner.study_file import dump_study

    there = detached.require_address(address)
    storage = open_storage(place.url)
    require_free(storage, file.name)
    history = find_history(storage, file.name)
    if history is not None:
        check_same_question(file, history.study_file, LineProgress(Console(stderr=True)))
    problem, _ = check_space(file)
    study_file = str(place.coordinator(file.name).with_suffix(".yaml"))
    task = detached.Task(
        job=Job.study(file.name),
        arguments=("study", "run", study_file),
        node_pools=(problem.node_pools,),
        files={study_file: dump_study(file)},
    )
    detached.detach(task, place, storage, there)
