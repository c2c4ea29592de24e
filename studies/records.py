"""What a study remembers of a trial, and how it is written as attributes of an Optuna trial.

User attributes (JSON) of schema version 1:

- `proposal`: schema, candidate and its key, origin, prediction made before measuring, attempt, losses, retry_of,
  repeat_of, lease, expected_gain;
- `status`: one of `TrialStatus`, for people who read the storage with other tools;
- `outcome`: the measurement or failure, with the ids of its artefacts. Writing it is the point of no return of `tell`:
  a coordinator that dies later finds it and finishes the trial, one that dies earlier leaves nothing to finish;
- `metrics`: every metric by name (flat), and `violations`: every constraint by name, feasible where at most 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from search_spaces.errors import require
from search_spaces.outcome import Failure, Measurement, Outcome, Prediction
from search_spaces.serving import Candidate
from studies.codec import Json, from_json, to_json
from studies.errors import StudyFormatError

SCHEMA = 1
EMULATED = "emulated"
EMULATED_NOTE = "EMULATED: the figures are those of a performance model, not measured on the hardware that is named."
PROPOSAL, STATUS, OUTCOME, METRICS, VIOLATIONS = "proposal", "status", "outcome", "metrics", "violations"


class Origin(StrEnum):
    """Where a proposal came from: `unscreened` ones skip the model's choice, so that its bias shows.

    `control` and `confirm` measure again what was measured before (see `studies.repeats`).
    """

    DEFAULT = "default"
    SEED = "seed"
    SCREENED = "screened"
    UNSCREENED = "unscreened"
    WARM = "warm"
    CONTROL = "control"
    CONFIRM = "confirm"

    @property
    def is_repeat(self) -> bool:
        """True where the trial repeats an earlier one on purpose: it is no new candidate."""
        return self in (Origin.CONTROL, Origin.CONFIRM)


class TrialStatus(StrEnum):
    """State of a trial: `measured` and `failed` are finished, `lost` fell to a fault of the infrastructure."""

    WAITING = "waiting"
    RUNNING = "running"
    MEASURED = "measured"
    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A proposal as it is stored.

    `attempt` counts the tries after faults of the infrastructure, from 1; `losses` how often its coordinator died.
    `retry_of` is the number of the lost trial that it stands for, `repeat_of` that of the measured trial whose
    candidate it measures again on purpose. `lease` is the id of the lease under which it is measured, None while it
    waits. `expected_gain` is what the screen expected of its best candidate: growth of the hypervolume,
    relative to what is held; None where it did not choose by that.
    """

    candidate: Candidate
    key: str
    origin: Origin
    prediction: Prediction | None = None
    attempt: int = 1
    losses: int = 0
    retry_of: int | None = None
    repeat_of: int | None = None
    lease: str | None = None
    expected_gain: float | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        require(self.attempt >= 1, f"attempt={self.attempt} must be at least 1")
        require(self.losses >= 0, f"losses={self.losses} must not be negative")
        require(
            self.origin.is_repeat == (self.repeat_of is not None),
            f"origin {self.origin} with repeat_of={self.repeat_of}: a repeat, and only that, names what it repeats",
        )


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A candidate to measure next, for trial `trial_number`; `prediction` is None where there is no model.

    `repeat_of` is the number of the trial that it measures again on purpose, None for a new candidate.
    """

    trial_number: int
    candidate: Candidate
    origin: Origin
    prediction: Prediction | None
    attempt: int = 1
    repeat_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a study.

    `values` are the objectives of a measured trial in the study's order, None for every other. `violations` maps the
    name of a constraint to its relative violation (feasible where at most 0). `lease` is the one it was measured under.
    """

    number: int
    status: TrialStatus
    candidate: Candidate | None
    key: str | None
    origin: Origin | None
    prediction: Prediction | None
    outcome: Outcome | None
    values: tuple[float, ...] | None
    violations: Mapping[str, float] = field(default_factory=dict)
    attempt: int = 1
    losses: int = 0
    retry_of: int | None = None
    repeat_of: int | None = None
    lease: str | None = None
    expected_gain: float | None = None
    artifact_ids: Mapping[str, str] = field(default_factory=dict)
    started_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def measurement(self) -> Measurement | None:
        """The measurement of a measured trial."""
        return self.outcome if isinstance(self.outcome, Measurement) else None

    @property
    def failure(self) -> Failure | None:
        """The failure of a failed or lost trial."""
        return self.outcome if isinstance(self.outcome, Failure) else None

    @property
    def is_repeat(self) -> bool:
        """True where the trial measures again on purpose what an earlier one measured."""
        return self.repeat_of is not None

    @property
    def is_finished(self) -> bool:
        """True where the trial was measured, or failed through its own configuration."""
        return self.status in (TrialStatus.MEASURED, TrialStatus.FAILED)

    @property
    def feasible(self) -> bool:
        """True where the trial was measured and meets every constraint; only such trials can be on the front."""
        return self.status is TrialStatus.MEASURED and all(value <= 0 for value in self.violations.values())


def encode_plan(plan: Plan) -> Json:
    """`plan` as the attribute `proposal`."""
    return to_json(plan)


def decode_plan(data: Json) -> Plan:
    """The plan in the attribute `proposal`; raises `StudyFormatError` for another schema version."""
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise StudyFormatError(f"trial schema {version} cannot be read, this version reads {SCHEMA}: upgrade tuner")
    return from_json(Plan, data)


def encode_outcome(outcome: Outcome, artifact_ids: Mapping[str, str]) -> Json:
    """`outcome` and its uploaded artefacts as the attribute `outcome`."""
    kind = "measurement" if isinstance(outcome, Measurement) else "failure"
    return {"schema": SCHEMA, "kind": kind, "value": to_json(outcome), "artifact_ids": to_json(artifact_ids)}


def decode_outcome(data: Json) -> tuple[Outcome, dict[str, str]]:
    """The outcome and the artefact ids in the attribute `outcome`."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise StudyFormatError(f"outcome {str(data)[:80]} is not of schema {SCHEMA}; upgrade tuner")
    ids, value = data["artifact_ids"], data["value"]
    measured = data["kind"] == "measurement"
    outcome: Outcome = from_json(Measurement, value) if measured else from_json(Failure, value)
    return outcome, {name: str(value) for name, value in ids.items()} if isinstance(ids, dict) else {}


def decode_trial(trial: FrozenTrial) -> TrialRecord:
    """The record of `trial`; a trial without a proposal (its coordinator died while it was made) has no candidate."""
    attrs: dict[str, Json] = trial.user_attrs
    plan = decode_plan(attrs[PROPOSAL]) if PROPOSAL in attrs else None
    outcome, ids = decode_outcome(attrs[OUTCOME]) if OUTCOME in attrs else (None, {})
    status = _status(trial.state, outcome)
    violations = attrs.get(VIOLATIONS)
    return TrialRecord(
        number=trial.number,
        status=status,
        candidate=plan.candidate if plan else None,
        key=plan.key if plan else None,
        origin=plan.origin if plan else None,
        prediction=plan.prediction if plan else None,
        outcome=outcome,
        values=tuple(trial.values) if status is TrialStatus.MEASURED else None,
        violations=from_json_numbers(violations) if violations is not None else {},
        attempt=plan.attempt if plan else 1,
        losses=plan.losses if plan else 0,
        retry_of=plan.retry_of if plan else None,
        repeat_of=plan.repeat_of if plan else None,
        lease=plan.lease if plan else None,
        expected_gain=plan.expected_gain if plan else None,
        artifact_ids=ids,
        started_at=trial.datetime_start,
        ended_at=trial.datetime_complete,
    )


def from_json_numbers(data: Json) -> dict[str, float]:
    """A flat mapping of numbers; raises `StudyFormatError` for anything else."""
    if not isinstance(data, dict):
        raise StudyFormatError(f"{str(data)[:80]} is no mapping of numbers; the record is damaged")
    return {name: from_json(float, value) for name, value in data.items()}


def _status(state: OptunaState, outcome: Outcome | None) -> TrialStatus:
    if state is OptunaState.COMPLETE and outcome is not None:
        return TrialStatus.MEASURED if isinstance(outcome, Measurement) else TrialStatus.FAILED
    return {OptunaState.WAITING: TrialStatus.WAITING, OptunaState.RUNNING: TrialStatus.RUNNING}.get(
        state, TrialStatus.LOST
    )
