"""What every part of the service needs: where it answers from, who may ask, and how answers and errors are told."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Path, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict

from studies.errors import StudyHalfMadeError
from studies.history import StudyHistory, study_names
from studies.storage import Storage, faults_told
from tuner import report
from tuner.places import Place
from tuner.serve.access import Right, Tokens
from tuner.serve.answers import Problem
from tuner.serve.runs import Runs
from tuner.stored import make_report, stored_file

Responses = dict[int | str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Service:
    """What requests are answered from. `computing` is held by the one prediction that runs at a time."""

    place: Place
    storage: Storage
    tokens: Tokens
    runs: Runs
    computing: threading.Lock = field(default_factory=threading.Lock)
    _histories: dict[str, StudyHistory] = field(default_factory=dict)

    def history(self, name: str) -> StudyHistory:
        """The stored study called `name`; what has ended of it is decoded once. Raises `StudyNotFoundError`."""
        known = self._histories.get(name)
        found = StudyHistory(self.storage, name)
        if known is None or known.id != found.id:
            self._histories[name] = known = found
        return known

    def find_history(self, name: str) -> StudyHistory | None:
        """The stored study called `name`; None where there is none, or only its name yet."""
        try:
            return self.history(name) if name in study_names(self.storage) else None
        except StudyHalfMadeError:
            return None


class Body(BaseModel):
    """Base of what is sent: unknown keys and silent conversions are errors, as in a study file."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def service_of(request: Request) -> Service:
    """The service of the application."""
    service: Service = request.app.state.service
    return service


_bearer = HTTPBearer(auto_error=False, description="The read or the write token of the service.")
TheService = Annotated[Service, Depends(service_of)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
Name = Annotated[str, Path(description="Name of a study.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def reader(service: TheService, credentials: Credentials) -> None:
    """Raise 401 for a request that may not read."""
    if service.tokens.right_of(credentials.credentials if credentials else None) is Right.NONE:
        raise HTTPException(401, "a token of this service is needed", {"WWW-Authenticate": "Bearer"})


def writer(service: TheService, credentials: Credentials) -> None:
    """Raise 403 for a request that may not write."""
    reader(service, credentials)
    if service.tokens.right_of(credentials.credentials if credentials else None) is not Right.WRITE:
        raise HTTPException(403, "the write token is needed; without one the service only reads")


def stored(service: TheService) -> Iterator[None]:
    """Inside, a database that fails is a `StorageLostError` in words, which is answered with 503."""
    with faults_told(service.storage):
        yield


GATE = [Depends(reader), Depends(stored)]
"""Before every operation of the API."""


def told(text: str) -> dict[str, Any]:
    """How OpenAPI tells of an error: always JSON, also where the answer is another kind of text."""
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    return {"description": text, "content": {"application/json": {"schema": schema}}}


ALWAYS: Responses = {
    403: told("the write token is needed, or, without tokens, the request names another host than this machine"),
    411: told("the length of the body is not given"),
    413: told("the body is too large"),
}
GUARDED: Responses = ALWAYS | {
    401: told("no token, or a wrong one"),
    422: told("KEY: what is wrong, the limit, the remedy"),
    503: told("the storage cannot be reached"),
}
NOT_FOUND: Responses = {404: told("no such study")}
UNREADABLE: Responses = {400: told("the body is no text of JSON")}
BUSY: Responses = {429: told("another one is being computed; try again")}
CONFLICT: Responses = {409: told("somebody runs the study, or it is there already")}


@contextmanager
def alone(service: Service) -> Iterator[None]:
    """One prediction at a time: it takes seconds of a whole core."""
    if not service.computing.acquire(blocking=False):
        raise HTTPException(429, "another prediction is being computed; try again", {"Retry-After": "2"})
    try:
        yield
    finally:
        service.computing.release()


def report_of(service: Service, name: str) -> report.StudyReport:
    """The study called `name` as it stands."""
    history = service.history(name)
    return make_report(history, stored_file(history, service.place))


def as_json(tree: object, status: int = 200) -> JSONResponse:
    """`tree` as JSON; figures that are not finite become null, which JSON has no word for."""
    return JSONResponse(finite(tree), status)


def finite(tree: object) -> object:
    """`tree` with null for figures that are not finite."""
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    if isinstance(tree, dict):
        return {str(key): finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return tree
