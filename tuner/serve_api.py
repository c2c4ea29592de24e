"""The HTTP service over the functions of the commands: studies, fronts, status, logs, predictions, what-ifs, stop."""

from __future__ import annotations

import asyncio
import json
import math
import re
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Annotated

import yaml
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from search_spaces.errors import InvalidValueError, TunerError, require
from studies.codec import Json
from studies.errors import StorageError, StudyBusyError, StudyNotFoundError
from studies.history import summaries
from studies.lease import is_free, order_stop, read_lease
from studies.lease_record import Event
from studies.storage import Storage, open_lease_book
from tuner import report
from tuner.places import Place
from tuner.predict_report import outlook_json
from tuner.prediction import look_out
from tuner.remote import require_known
from tuner.serve_access import Guard, Right, Tokens
from tuner.status import status_json, status_of
from tuner.stored import find_history, history_of, make_report, stored_file
from tuner.study_file import CALIBRATIONS, load_study_file
from tuner.study_schema import StudyFile
from tuner.whatif import what_if
from tuner.whatif_cli import whatif_json

FOLLOW_S = 1.0
LARGEST_NUMBER = 10_000_000
LARGEST_TURNS = 1_000
LONGEST_LIST = 256
DEEPEST = 24
"""What a question may hold, so that answering it takes seconds: the model's work grows with some of its figures."""
_SETTING = re.compile(
    r"(load|(mixed|prefill|decode)\.\w+"
    r"|workload\.(isl|osl|turns|arrival|concurrency|request_rate|shared_prefix|think_time)(\.\w+)?"
    r"|node_pools\.[\w-]+\.(device|nodes|gpus_per_node|cpus_per_node|pricing|\w*price_per_hour)"
    r")\s*=[^&*]{1,100}"
)
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
_ABOUT = """Studies of one storage: what they measured, how they stand, and what the model predicts.

Give a token as `Authorization: Bearer TOKEN`. Errors are `{"detail": ...}` with the value, the limit and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """What requests are answered from. `computing` is held by the one prediction that runs at a time."""

    place: Place
    storage: Storage
    tokens: Tokens
    computing: threading.Lock = field(default_factory=threading.Lock)


def make_app(service: Service) -> FastAPI:
    """The application. Its description is at /openapi.json; no page of it fetches anything from elsewhere."""
    app = FastAPI(
        title="tuner", version=version("tuner"), description=_ABOUT, docs_url=None, redoc_url=None, debug=False
    )
    app.state.service = service
    app.include_router(_open)
    app.include_router(_api)
    app.add_middleware(Guard, local_only=not service.tokens.any)
    app.add_exception_handler(TunerError, _told)
    app.add_exception_handler(RequestValidationError, _malformed)
    return app


def _told(_request: Request, error: Exception) -> JSONResponse:
    """An error that the asker can mend, with the text that the command would print."""
    kinds: tuple[tuple[type[TunerError], int], ...] = (
        (StudyNotFoundError, 404),
        (StudyBusyError, 409),
        (StorageError, 503),
    )
    status = next((status for kind, status in kinds if isinstance(error, kind)), 422)
    return JSONResponse({"detail": _encodable(str(error))}, status)


def _malformed(_request: Request, error: Exception) -> JSONResponse:
    """A request that is not what the description says, in words and without repeating it."""
    problems = error.errors() if isinstance(error, RequestValidationError) else ()
    told = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems]
    return JSONResponse({"detail": _encodable("; ".join(told))}, 422)


def _encodable(text: str) -> str:
    """`text` without halves of characters, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


_bearer = HTTPBearer(auto_error=False, description="The read or the write token of the service.")
TheService = Annotated[Service, Depends(_service)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
Name = Annotated[str, Path(description="Name of a study.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def _reader(service: TheService, credentials: Credentials) -> None:
    if service.tokens.right_of(credentials.credentials if credentials else None) is Right.NONE:
        raise HTTPException(401, "a token of this service is needed", {"WWW-Authenticate": "Bearer"})


def _writer(service: TheService, credentials: Credentials) -> None:
    _reader(service, credentials)
    if service.tokens.right_of(credentials.credentials if credentials else None) is not Right.WRITE:
        raise HTTPException(403, "the write token is needed; without one the service only reads")


def _error(text: str) -> dict[str, object]:
    return {"description": text, "content": {"application/json": {"example": {"detail": text}}}}


_open = APIRouter()
_api = APIRouter(
    prefix="/api/v1",
    dependencies=[Depends(_reader)],
    responses={
        401: _error("no token, or a wrong one"),
        422: _error("KEY: what is wrong, the limit, the remedy"),
        503: _error("the storage cannot be reached"),
    },
)
_NOT_FOUND: dict[int | str, dict[str, object]] = {404: _error("no such study")}
_BUSY: dict[int | str, dict[str, object]] = {429: _error("another prediction is being computed")}
_WRITES: dict[int | str, dict[str, object]] = {403: _error("the write token is needed")}


@_open.get("/health", tags=["service"])
def health() -> dict[str, str]:
    """Whether the service answers; needs no token."""
    return {"status": "ok"}


@_api.get("/studies", tags=["studies"])
def studies(service: TheService) -> JSONResponse:
    """The studies of the storage."""
    return _json(report.summaries_json(summaries(service.storage)))


@_api.get("/studies/{name}", tags=["studies"], responses=_NOT_FOUND)
def study(service: TheService, name: Name) -> JSONResponse:
    """A study with every trial: what `tuner study show --json` prints."""
    return _json(report.show_json(_report(service, name)))


@_api.get("/studies/{name}/front", tags=["studies"], responses=_NOT_FOUND)
def front(service: TheService, name: Name) -> JSONResponse:
    """The Pareto front: what `tuner study pareto --json` prints."""
    return _json(report.front_json(_report(service, name)))


@_api.get("/studies/{name}/front.csv", tags=["studies"], responses=_NOT_FOUND, response_class=PlainTextResponse)
def front_csv(service: TheService, name: Name) -> PlainTextResponse:
    """The Pareto front as CSV."""
    return PlainTextResponse(report.front_csv(_report(service, name)), media_type="text/csv")


@_api.get("/studies/{name}/status", tags=["studies"], responses=_NOT_FOUND)
def status(service: TheService, name: Name) -> JSONResponse:
    """Who runs a study, its last heartbeat, its trials and the time left."""
    require_known(service.storage, name)
    history = find_history(service.storage, name)
    budget = stored_file(history, service.place).budget if history else None
    trials = history.trials() if history else ()
    lease = read_lease(service.storage, name)
    return _json(status_json(status_of(name, service.storage.url, trials, lease, budget)))


@_api.get("/studies/{name}/events", tags=["studies"], responses=_NOT_FOUND)
def events(
    service: TheService,
    name: Name,
    after: Annotated[int, Query(ge=0, le=2**31, description="Only lines behind this number.")] = 0,
) -> JSONResponse:
    """What the coordinators of a study have written, line by line."""
    require_known(service.storage, name)
    return _json([_event(event) for event in _events(service, name, after)])


@_api.get("/studies/{name}/events/stream", tags=["studies"], responses=_NOT_FOUND, response_class=StreamingResponse)
def stream(
    request: Request,
    service: TheService,
    name: Name,
    after: Annotated[int, Query(ge=0, le=2**31, description="Only lines behind this number.")] = 0,
) -> StreamingResponse:
    """Server-sent events: each line as it is written, and `event: end` when nobody runs the study any more."""
    require_known(service.storage, name)
    return StreamingResponse(_followed(request, service, name, after), media_type="text/event-stream")


class Question(BaseModel):
    """A study to predict."""

    model_config = ConfigDict(extra="forbid")

    study: str = Field(
        max_length=64 * 1024, description="a study file (YAML); it may name no file or folder of the server"
    )
    top: int = Field(default=5, ge=0, le=20, description="best configurations to list")


@_api.post("/predict", tags=["model"], responses=_BUSY)
def predict(service: TheService, question: Question) -> JSONResponse:
    """What the model expects of a study's defaults and of the best of its space; nothing is launched or stored."""
    file = _study_of(question.study)
    with _alone(service):
        return _json(outlook_json(look_out(file, top=question.top)))


class Change(BaseModel):
    """Settings to change, in the words of `tuner whatif --set`."""

    model_config = ConfigDict(extra="forbid")

    settings: list[Annotated[str, Field(max_length=200)]] = Field(
        default_factory=list,
        max_length=20,
        description="such as decode.tp=4, load=32, workload.isl=4096 or node_pools.main.device=h200_sxm",
    )
    trial: str = Field(default="best", pattern=r"^(best|\d{1,9})$", description="the trial to start from")


@_api.post("/studies/{name}/whatif", tags=["model"], responses=_NOT_FOUND | _BUSY)
def whatif(service: TheService, name: Name, change: Change) -> JSONResponse:
    """What the model that a study has corrected says of changed settings; nothing is measured or stored."""
    for setting in change.settings:
        if not _SETTING.fullmatch(setting):
            raise InvalidValueError(
                f"{setting!r} cannot be asked here; change load, ROLE.OPTION, workload.KEY or node_pools.POOL.KEY"
            )
        key, _, value = setting.partition("=")
        _require_modest(_yaml(value, setting), key.strip())
    with _alone(service):
        found = what_if(history_of(service.place, name), service.place, change.settings, trial=change.trial)
        return _json(whatif_json(found))


@_api.post("/studies/{name}/stop", tags=["control"], dependencies=[Depends(_writer)], responses=_NOT_FOUND | _WRITES)
def stop(service: TheService, name: Name) -> dict[str, str]:
    """Order the coordinator of a study to stop, wherever it runs; what it has measured stays."""
    record = order_stop(service.storage, name)
    return {"study": name, "ordered": str(record.holder)}


def _report(service: Service, name: str) -> report.StudyReport:
    history = history_of(service.place, name)
    return make_report(history, stored_file(history, service.place))


def _events(service: Service, name: str, after: int) -> list[Event]:
    book = open_lease_book(service.storage)
    try:
        return book.events(name, after=after)
    finally:
        book.close()


def _event(event: Event) -> dict[str, Json]:
    return {"number": event.number, "at_s": event.at_s, "run": event.run, "text": event.text}


async def _followed(request: Request, service: Service, name: str, after: int) -> AsyncIterator[str]:
    """Lines as they come. The end is looked for before the lines, so that the last ones are not missed."""
    while not await request.is_disconnected():
        ended = is_free(await run_in_threadpool(read_lease, service.storage, name))
        for event in await run_in_threadpool(_events, service, name, after):
            after = event.number
            yield f"id: {event.number}\ndata: {json.dumps(_event(event))}\n\n"
        if ended:
            yield "event: end\ndata: {}\n\n"
            return
        await asyncio.sleep(FOLLOW_S)


@contextmanager
def _alone(service: Service) -> Iterator[None]:
    """One prediction at a time: it takes seconds of a whole core."""
    if not service.computing.acquire(blocking=False):
        raise HTTPException(429, "another prediction is being computed; try again", {"Retry-After": "2"})
    try:
        yield
    finally:
        service.computing.release()


def _study_of(text: str) -> StudyFile:
    """The study in `text` over the product's layers; raises `TunerError` where it names anything of the server."""
    _require_harmless(text)
    with tempfile.TemporaryDirectory(prefix="tuner-serve-") as folder:
        path = FilePath(folder) / "study.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            file = load_study_file(path)
        except TunerError as error:
            raise InvalidValueError(str(error).replace(str(path), "study")) from error
    named = {
        "model.gguf": file.model.gguf,
        "model.config": file.model.config,
        "workload.trace": file.workload.trace,
        "calibration": file.calibration if file.calibration not in CALIBRATIONS else None,
    }
    given = [key for key, value in named.items() if value is not None]
    if given:
        raise InvalidValueError(f"{', '.join(given)} names a file of the server; use the command tuner predict there")
    return file


def _require_harmless(text: str) -> None:
    """Raise for layers of the server's folders, and for aliases, by which a short text becomes a huge tree."""
    tree = _yaml(text, "the study")
    if isinstance(tree, dict) and "layers" in tree:
        raise InvalidValueError("layers names folders of the server; leave it out")
    _require_modest(tree, "")


def _yaml(text: str, name: str) -> object:
    """The tree of `text`. Aliases are refused, by which a short text becomes a huge tree, and so is deep nesting."""
    depth = 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            _require_plain(token, depth, name)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidValueError(f"{name} is no valid YAML: {error}") from error
    except ValueError as error:
        if isinstance(error, TunerError):
            raise
        raise InvalidValueError(f"{name} is no valid YAML: {error}") from error


def _require_plain(token: yaml.Token, depth: int, name: str) -> None:
    require(not isinstance(token, yaml.AliasToken), f"{name} has aliases (*word); write their values out")
    require(depth <= DEEPEST, f"{name} is nested more than {DEEPEST} deep; no study file is")


def _require_modest(tree: object, path: str) -> None:
    """Raise for a figure or a list of a question that would take the model very long."""
    limit = LARGEST_TURNS if path.startswith("workload.turns") else LARGEST_NUMBER
    if isinstance(tree, int | float) and not abs(tree) <= limit:
        raise InvalidValueError(f"{path}: {tree} is beyond what this service computes; give at most {limit}")
    if isinstance(tree, list) and len(tree) > LONGEST_LIST:
        raise InvalidValueError(f"{path}: {len(tree)} values are more than this service takes; give {LONGEST_LIST}")
    if isinstance(tree, list):
        for value in tree:
            _require_modest(value, path)
    if isinstance(tree, dict):
        for key, value in tree.items():
            _require_modest(value, f"{path}.{key}".strip("."))


def _json(tree: object) -> JSONResponse:
    """`tree` as JSON; figures that are not finite become null, which JSON has no word for."""
    return JSONResponse(_finite(tree))


def _finite(tree: object) -> object:
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    if isinstance(tree, dict):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return tree
