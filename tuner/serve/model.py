"""What the service computes: predictions, what-ifs, plans and ranks under other SLOs. Nothing is launched or stored."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import Field

from search_spaces.errors import InvalidValueError
from studies.history import StudyHistory
from tuner.importance import importance, importance_json
from tuner.plan import Demand
from tuner.plan_cli import make_plan, planned_json, priced
from tuner.predict_report import outlook_json
from tuner.prediction import look_out
from tuner.score import ranked
from tuner.score_cli import rescore_json, with_slos
from tuner.serve import answers
from tuner.serve.context import (
    BUSY,
    GATE,
    GUARDED,
    NOT_FOUND,
    UNREADABLE,
    Body,
    Name,
    Service,
    TheService,
    alone,
    as_json,
)
from tuner.serve.questions import LONGEST_TEXT, read_yaml, require_modest, require_setting, study_of
from tuner.stored import stored_file
from tuner.study_schema import StudyFile
from tuner.whatif import what_if
from tuner.whatif_cli import whatif_json
from tuner.wiring import make_problem

router = APIRouter(prefix="/api/v1", tags=["model"], dependencies=GATE, responses=GUARDED | BUSY)
Short = Annotated[str, Field(max_length=200)]
Slos = Annotated[
    list[Short],
    Field(max_length=20, description="METRIC=THRESHOLD, METRIC={threshold: .., kind: soft, ..}, or METRIC=none"),
]


class Question(Body):
    """A study to predict."""

    study: str = Field(
        max_length=LONGEST_TEXT, description="a study file (YAML); it may name no file or folder of the server"
    )
    top: int = Field(default=5, ge=0, le=20, description="best configurations to list")


class Change(Body):
    """Settings to change, in the words of `tuner whatif --set`."""

    settings: list[Short] = Field(
        default_factory=list,
        max_length=20,
        description="such as decode.tp=4, load=32, workload.isl=4096 or node_pools.main.device=h200_sxm",
    )
    trial: str = Field(default="best", pattern=r"^(best|\d{1,9})$", description="the trial to start from")


class Wanted(Body):
    """A demand, in the words of `tuner plan`; at least one of rate, users and gpus."""

    rate: float | None = Field(default=None, gt=0, le=1e7, description="requests per second to serve")
    users: float | None = Field(default=None, gt=0, le=1e7, description="requests in flight to serve")
    gpus: int | None = Field(default=None, ge=1, le=1_000_000, description="devices that replicas may take")
    pools: list[Short] = Field(
        default_factory=list, max_length=20, description="node pools to use, with their nodes: h200=10; all by default"
    )
    headroom: float = Field(default=0.0, ge=0, le=100, description="share on top of the demand")
    pricing: Literal["on_demand", "spot", "reserved"] | None = Field(default=None, description="which prices count")
    slos: Slos = Field(default_factory=list)
    predicted: int = Field(default=0, ge=0, le=2000, description="configurations to predict beside measured ones")


class Rescored(Body):
    """Other SLOs, in the words of `tuner study rescore`."""

    slos: Slos = Field(default_factory=list)
    by: list[Short] = Field(default_factory=list, max_length=4, description="objectives of the score; the study's own")


@router.post("/predict", response_model=answers.Outlook, responses=UNREADABLE)
def predict(service: TheService, question: Question) -> JSONResponse:
    """What the model expects of a study's defaults and of the best of its space: `tuner predict --json`."""
    file = study_of(question.study)
    with alone(service):
        return as_json(outlook_json(look_out(file, top=question.top)))


@router.post("/studies/{name}/whatif", response_model=answers.WhatIf, responses=NOT_FOUND | UNREADABLE)
def whatif(service: TheService, name: Name, change: Change) -> JSONResponse:
    """What the model that a study has corrected says of changed settings: `tuner whatif --json`."""
    for setting in change.settings:
        require_setting(setting)
    with alone(service):
        found = what_if(service.history(name), service.place, change.settings, trial=change.trial)
        return as_json(whatif_json(found))


@router.post("/studies/{name}/plan", response_model=answers.Plan, responses=NOT_FOUND | UNREADABLE)
def plan(service: TheService, name: Name, wanted: Wanted) -> JSONResponse:
    """Copies, nodes and money for a demand, from what the study measured: `tuner plan --json`."""
    demand = Demand(rate=wanted.rate, users=wanted.users, devices=wanted.gpus, headroom=wanted.headroom)
    for pool in wanted.pools:
        require_modest(read_yaml(pool.partition("=")[2], pool), pool)
    history = service.history(name)
    file = priced(_under(history, service, wanted.slos), wanted.pricing)
    with alone(service):
        made = make_plan(name, file, history.trials(), demand, wanted.pools, wanted.predicted)
        return as_json(planned_json(made))


@router.post("/studies/{name}/rescore", response_model=answers.Ranks, responses=NOT_FOUND | UNREADABLE)
def rescore(service: TheService, name: Name, asked: Rescored) -> JSONResponse:
    """The measured configurations ranked under other SLOs: `tuner study rescore --json`."""
    history = service.history(name)
    before = make_problem(stored_file(history, service.place))
    after = make_problem(_under(history, service, asked.slos))
    objectives = tuple(asked.by or (objective.metric for objective in before.objectives))
    now, then = (ranked(history.trials(), objectives, problem.slos) for problem in (after, before))
    earlier = {item.trial.number: item.rank for item in then}
    return as_json(rescore_json(name, objectives, after.slos, now, earlier))


@router.get("/studies/{name}/importance", response_model=answers.Importance, responses=NOT_FOUND)
def importance_of(service: TheService, name: Name) -> JSONResponse:
    """How much each parameter matters, measured and as the model sees it: `tuner study importance --json`."""
    with alone(service):
        return as_json(importance_json(importance(service.history(name), service.place)))


def _under(history: StudyHistory, service: Service, slos: list[str]) -> StudyFile:
    """The stored study file under `slos`."""
    for text in slos:
        metric, equals, value = text.partition("=")
        if not equals:
            raise InvalidValueError(f"{text!r} is no SLO; write such as ttft_p95_ms=500")
        require_modest(read_yaml(value, text), metric.strip())
    return with_slos(history, service.place, slos)
