"""The read side of a study: what is stored, decoded. It needs neither the search space nor a model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState as OptunaState

from search_spaces.hardware import Device
from search_spaces.metrics import Direction
from studies.codec import Json, from_json
from studies.device_use import DeviceUse
from studies.errors import StudyFormatError, StudyHalfMadeError, StudyNotFoundError
from studies.records import SCHEMA, TrialRecord, decode_trial
from studies.stopping import StopReason
from studies.storage import Storage

STUDY_FILE, STUDY_HASH, STUDY_SCHEMA = "study_file", "study_file_sha256", "schema"
CAMPAIGN_SCHEMA = "campaign_schema"
"""What a campaign has in place of a study's schema (see `studies.campaign_store`)."""
POPULATION = "population_size"
NODE_DEVICES, DEVICE_USE = "node_devices", "device_use"
EARLIER = "earlier_studies"
"""Earlier studies that taught this one or gave it seeds, in words."""
ENDED = "ended"
"""Why the last run ended by itself, as a `studies.stopping.StopReason`; None while one runs and after a stop."""
STABILITY = "stability"
"""Noise and drift, as `studies.noise.Stability`, after the last repeat."""
_FINISHED = (OptunaState.COMPLETE, OptunaState.FAIL, OptunaState.PRUNED)


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """A study at a glance: trials measured, failed through their configuration, lost, and open (waiting or running)."""

    name: str
    objectives: tuple[str, ...]
    measured: int
    failed: int
    lost: int
    open: int
    started_at: datetime | None


class StudyHistory:
    """Reads one study.

    Raises `StudyNotFoundError`, `StudyHalfMadeError`, or `StudyFormatError` for one that tuner did not write.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = name
        self.storage = storage
        self._study = load_optuna_study(storage, name)
        version = self._study.user_attrs.get(STUDY_SCHEMA)
        if CAMPAIGN_SCHEMA in self._study.user_attrs:
            raise StudyFormatError(f"{name!r} is no study but keeps a campaign; look at it with: tuner campaign list")
        if version is None and not self._study.get_trials(deepcopy=False):
            raise StudyHalfMadeError(
                f"study {name!r} has schema None and no trials: it is being made, or another program's; look again "
                "in a moment, or run it again"
            )
        if version != SCHEMA:
            raise StudyFormatError(
                f"study {name!r} has schema {version}, this version of tuner reads {SCHEMA}; "
                "open it with the version that wrote it, or choose another study"
            )
        self._decoded: dict[int, TrialRecord] = {}

    @property
    def id(self) -> int:
        """Of the study in its storage: another study of that name, made later, has another one."""
        return int(self._study._study_id)  # noqa: SLF001 - Optuna tells it nowhere else

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objective metrics."""
        return tuple(self._study.metric_names or ())

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Better direction of each objective."""
        maximize = StudyDirection.MAXIMIZE
        return tuple(Direction.MAXIMIZE if d == maximize else Direction.MINIMIZE for d in self._study.directions)

    @property
    def population(self) -> int:
        """Trials of one generation."""
        return int(self._study.user_attrs[POPULATION])

    @property
    def node_devices(self) -> dict[str, Device]:
        """What a device of each measured node pool can do, as its study measured it; empty where none was."""
        stored: dict[str, Json] = self._study.user_attrs.get(NODE_DEVICES, {})
        return {name: from_json(Device, device) for name, device in stored.items()}

    @property
    def device_use(self) -> DeviceUse:
        """How well the runs of the study used the devices, as far as they have said."""
        return from_json(DeviceUse, self._study.user_attrs.get(DEVICE_USE, {}))

    @property
    def study_file(self) -> str:
        """The resolved study file that the study was made with, with the budget of its last run."""
        return str(self._study.user_attrs[STUDY_FILE])

    @property
    def ended(self) -> StopReason | None:
        """Why the last run ended by itself; None where it did not, or is under way."""
        reason = self._study.user_attrs.get(ENDED)
        return None if reason is None else StopReason(reason)

    @property
    def earlier(self) -> tuple[str, ...]:
        """Earlier studies that taught this one or gave it seeds, in words."""
        return tuple(map(str, self._study.user_attrs.get(EARLIER, ())))

    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials by number. Finished ones never change and are decoded once."""
        return tuple(self._record(trial) for trial in self._study.get_trials(deepcopy=False))

    @property
    def started_at(self) -> datetime | None:
        """When the first trial began; None before that. Nothing is decoded for it."""
        began = (trial.datetime_start for trial in self._study.get_trials(deepcopy=False))
        return min((moment for moment in began if moment is not None), default=None)

    def _record(self, trial: optuna.trial.FrozenTrial) -> TrialRecord:
        if trial.number in self._decoded:
            return self._decoded[trial.number]
        record = decode_trial(trial)
        if trial.state in _FINISHED:
            self._decoded[trial.number] = record
        return record

    def summary(self) -> StudySummary:
        """Counts and names."""
        trials = self.trials()
        count = {status: sum(trial.status == status for trial in trials) for status in ("measured", "failed", "lost")}
        return StudySummary(
            name=self.name,
            objectives=self.objectives,
            measured=count["measured"],
            failed=count["failed"],
            lost=count["lost"],
            open=len(trials) - sum(count.values()),
            started_at=self.started_at,
        )


def study_names(storage: Storage) -> tuple[str, ...]:
    """Names of all studies in `storage`, those of other programs included."""
    return tuple(optuna.get_all_study_names(storage.backend))


def summaries(storage: Storage) -> tuple[StudySummary, ...]:
    """Summaries of the studies that tuner wrote; others in the same storage are left out."""
    return tuple(StudyHistory(storage, name).summary() for name in our_names(storage))


def our_names(storage: Storage) -> tuple[str, ...]:
    """Names of the studies in `storage` that tuner wrote."""
    return tuple(name for name in study_names(storage) if _is_ours(storage, name))


def _is_ours(storage: Storage, name: str) -> bool:
    return load_optuna_study(storage, name).user_attrs.get(STUDY_SCHEMA) == SCHEMA


def load_optuna_study(
    storage: Storage, name: str, sampler: optuna.samplers.BaseSampler | None = None
) -> optuna.study.Study:
    """Optuna's own view of the study; raises `StudyNotFoundError` with the names there are."""
    try:
        reader = sampler or optuna.samplers.RandomSampler()
        return optuna.load_study(study_name=name, storage=storage.backend, sampler=reader)
    except KeyError as error:
        known = ", ".join(study_names(storage)) or "none"
        raise StudyNotFoundError(f"storage {storage.url} has no study {name!r}; it has: {known}") from error
