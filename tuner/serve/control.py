"""What takes the write token: submitting studies, going on with them, and stopping them."""

from __future__ import annotations

import signal
import socket

from fastapi import APIRouter, Depends, HTTPException
from fastapi.responses import JSONResponse
from pydantic import Field

from studies.errors import StudyBusyError, StudyExistsError
from studies.history import study_names
from studies.lease import is_free, order_stop, read_lease, require_free
from tuner.serve.answers import Ordered, Submission
from tuner.serve.context import (
    CONFLICT,
    GATE,
    GUARDED,
    NOT_FOUND,
    UNREADABLE,
    Body,
    Name,
    Service,
    TheService,
    as_json,
    told,
    writer,
)
from tuner.serve.questions import LONGEST_TEXT, study_of
from tuner.serve.runs import Run
from tuner.session import check_space
from tuner.stored import stored_file
from tuner.wiring import require_weights

router = APIRouter(prefix="/api/v1", tags=["control"], dependencies=GATE, responses=GUARDED)
_WRITES = [Depends(writer)]
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a study that was told to stop."""


class NewStudy(Body):
    """A study to run."""

    study: str = Field(
        max_length=LONGEST_TEXT,
        description="a study file (YAML); it may name no file, folder or program of the server, and no storage",
    )


class Onwards(Body):
    """How to go on with a study: its budget may change."""

    trials: int | None = Field(default=None, ge=1, le=1_000_000, description="budget.trials")
    wall_time_s: float | None = Field(default=None, gt=0, le=1e8, description="budget.wall_time, in seconds")
    device_hours: float | None = Field(default=None, gt=0, le=1e8, description="budget.device_hours")
    cost: float | None = Field(default=None, gt=0, le=1e9, description="budget.cost, in dollars")

    @property
    def overrides(self) -> list[str]:
        """What `--set` is given."""
        named = {"wall_time_s": "wall_time"}
        return [f"budget.{named.get(key, key)}={value}" for key, value in self.model_dump(exclude_none=True).items()]


@router.post(
    "/studies", response_model=Submission, status_code=202, dependencies=_WRITES, responses=UNREADABLE | CONFLICT
)
def submit(service: TheService, new: NewStudy) -> JSONResponse:
    """Check a study file, write it, and run it: `tuner study run`. The run goes on when the service ends."""
    file = study_of(new.study)
    check_space(file)
    require_weights(file)
    if file.name in study_names(service.storage):
        raise StudyExistsError(
            f"study {file.name!r} is there already; go on with it (POST /api/v1/studies/{file.name}/resume), "
            "or choose another name"
        )
    _require_free(service, file.name)
    return as_json(_submission(service, service.runs.submit(file.name, new.study)), 202)


@router.post(
    "/studies/{name}/resume",
    response_model=Submission,
    status_code=202,
    dependencies=_WRITES,
    responses=NOT_FOUND | UNREADABLE | CONFLICT,
)
def resume(service: TheService, name: Name, onwards: Onwards) -> JSONResponse:
    """Go on with a study that was stopped, or whose budget is raised: `tuner study resume`."""
    stored_file(service.history(name), service.place, onwards.overrides)
    _require_free(service, name)
    return as_json(_submission(service, service.runs.resume(name, onwards.overrides)), 202)


@router.post("/studies/{name}/stop", response_model=Ordered, dependencies=_WRITES, responses=NOT_FOUND)
def stop(service: TheService, name: Name) -> JSONResponse:
    """Order the coordinator of a study to stop, wherever it runs; what it has measured stays."""
    record = order_stop(service.storage, name)
    return as_json({"study": name, "ordered": str(record.holder)})


@router.get("/submissions", response_model=list[Submission])
def submissions(service: TheService) -> JSONResponse:
    """The runs that this service has started since it began, the earliest first."""
    return as_json([_submission(service, run) for run in service.runs.all()])


@router.get("/submissions/{name}", response_model=Submission, responses={404: told("this service has started none")})
def submission(service: TheService, name: Name) -> JSONResponse:
    """The last run of a study that this service has started: whether it began, and the last lines that it wrote."""
    run = service.runs.find(name)
    if run is None:
        raise HTTPException(404, f"this service has started no run of {name!r}")
    return as_json(_submission(service, run))


def _require_free(service: Service, name: str) -> None:
    """Raise `StudyBusyError` where the study is run, and on a machine alone where this machine runs another one."""
    require_free(service.storage, name)
    if service.runs.address is not None:
        return
    for other in study_names(service.storage):
        seen = read_lease(service.storage, other)
        holder = seen.record.holder if seen.record else None
        if holder is not None and not is_free(seen) and holder.host == socket.gethostname():
            raise StudyBusyError(f"study {other!r} runs on this machine, one at a time; wait for its end, or stop it")


def _submission(service: Service, run: Run) -> dict[str, object]:
    code = run.exit_code
    held = not is_free(read_lease(service.storage, run.study))
    if code in (None, 0) and held:
        state = "running"
    elif code is None:
        state = "starting"
    else:
        state = {0: "ended"}.get(code, "stopped" if code in _STOPPED else "failed")
    return {"study": run.study, "state": state, "since_s": run.since_s, "exit_code": code, "tail": run.tail}
