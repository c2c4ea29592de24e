"""The application of `tuner serve`: its parts put together, its errors in words, its page."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from search_spaces.errors import TunerError
from studies.errors import StorageError, StudyBusyError, StudyExistsError, StudyNotFoundError
from studies.storage import Storage
from tuner.places import Place
from tuner.serve import control, model, studies
from tuner.serve.access import Guard, Tokens
from tuner.serve.answers import Health, Problem
from tuner.serve.context import ALWAYS, Service
from tuner.serve.page import the_page
from tuner.serve.runs import Runs

_ABOUT = """Studies of one storage: what they measured, how they stand, what the model predicts, and new ones.

Give a token as `Authorization: Bearer TOKEN`. Errors are `{"detail": ...}` with the value, the limit and the remedy."""
_KINDS: tuple[tuple[type[TunerError], int], ...] = (
    (StudyNotFoundError, 404),
    (StudyBusyError, 409),
    (StudyExistsError, 409),
    (StorageError, 503),
)


def make_service(place: Place, storage: Storage, tokens: Tokens, address: str | None = None) -> Service:
    """A service over the studies of `place`; those that are submitted run on the cluster at `address`, or here."""
    return Service(place=place, storage=storage, tokens=tokens, runs=Runs(place=place, address=address))


def make_app(service: Service) -> FastAPI:
    """The application. Its description is at /openapi.json; no page of it fetches anything from elsewhere."""
    app = FastAPI(
        title="tuner",
        version=version("tuner"),
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        debug=False,
        redirect_slashes=False,
    )
    app.state.service = service
    for router in (_open, studies.router, model.router, control.router):
        app.include_router(router)
    app.add_middleware(Guard, local_only=not service.tokens.any)
    app.add_exception_handler(TunerError, _told)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.openapi_schema = _with_errors(app.openapi())
    return app


def _with_errors(document: dict[str, Any]) -> dict[str, Any]:
    """`document` with the shape of errors, to which every operation refers."""
    document["components"]["schemas"][Problem.__name__] = Problem.model_json_schema()
    return document


_open = APIRouter(responses=ALWAYS)


@_open.get("/health", tags=["service"], response_model=Health)
def health() -> JSONResponse:
    """Whether the service answers; needs no token."""
    return JSONResponse({"status": "ok"})


@_open.get("/", tags=["service"], response_class=HTMLResponse)
def page() -> HTMLResponse:
    """The page for browsers: the list of studies and their fronts, live. It holds nothing; it asks with a token."""
    text, policy = the_page()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def _told(_request: Request, error: Exception) -> JSONResponse:
    """An error that the asker can mend, with the text that the command would print."""
    status = next((status for kind, status in _KINDS if isinstance(error, kind)), 422)
    return JSONResponse({"detail": _encodable(str(error))}, status)


def _malformed(_request: Request, error: Exception) -> JSONResponse:
    """A request that is not what the description says, in words and without repeating it."""
    problems = error.errors() if isinstance(error, RequestValidationError) else ()
    told = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems]
    return JSONResponse({"detail": _encodable("; ".join(told))}, 422)


def _encodable(text: str) -> str:
    """`text` without halves of characters, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()
