"""What optuna-dashboard shows of a study beside its own charts: a note on it and on its trials, and charts of ours.

All of it are attributes of the study, written by whoever holds its lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import optuna
import optuna_dashboard
import plotly.graph_objects as go
from optuna_dashboard import _note as notes_format  # the public call reads every attribute anew for each note

from studies.codec import Json
from studies.history import load_optuna_study
from studies.records import EMULATED_NOTE
from studies.storage import Storage

FOUND = "**What was found.**"
"""How a note on the study begins that may be replaced: any other was written by a person."""

NOTES_AT_ONCE = 100
"""Notes that are written as one: meanwhile nobody else writes to a SQLite database, and the lease must be renewed."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """`summary` of a study, `notes` by number of a trial, both Markdown; `charts` by id, as plotly's JSON.

    An id is what HTML takes as one: letters, digits and hyphens.
    """

    summary: str
    notes: Mapping[int, str] = field(default_factory=dict)
    charts: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)


def save_views(storage: Storage, name: str, views: Views) -> None:
    """Write `views` of the study called `name`; call it under its lease.

    A trial that has a note keeps it, since finished trials do not change and a person may have edited it; for the
    same reason a note on the study is only replaced where it is of this tool. Raises `StudyNotFoundError`.
    """
    study = load_optuna_study(storage, name)
    study_id = storage.backend.get_study_id_from_name(name)
    attrs = storage.backend.get_study_system_attrs(study_id)
    new = [trial for trial in study.get_trials(deepcopy=False) if trial.number in views.notes]
    new = [t for t in new if notes_format.note_ver_key(t._trial_id) not in attrs]  # noqa: SLF001 - notes go by this id
    for first in range(0, len(new), NOTES_AT_ONCE):
        with storage.batch():
            for trial in new[first : first + NOTES_AT_ONCE]:
                _save_first_note(storage, study_id, trial, views.notes[trial.number])
    with storage.batch():
        if _is_ours(optuna_dashboard.get_note(study)):
            optuna_dashboard.save_note(study, f"{FOUND} {views.summary}")
        for chart, spec in views.charts.items():
            figure = go.Figure(dict(spec))
            optuna_dashboard.save_plotly_graph_object(study, figure, graph_object_id=chart)


def _save_first_note(storage: Storage, study_id: int, trial: optuna.trial.FrozenTrial, body: str) -> None:
    key = trial._trial_id  # noqa: SLF001 - notes are kept by this id
    storage.backend.set_study_system_attr(study_id, notes_format.note_ver_key(key), 1)
    for attr, part in notes_format.split_body(body, key).items():
        storage.backend.set_study_system_attr(study_id, attr, part)


def _is_ours(body: str) -> bool:
    return body in ("", f"**{EMULATED_NOTE}**") or body.startswith(FOUND)
