"""Files that optuna-dashboard shows with a trial that has ended, beside those that its measurement left.

Optuna refuses attributes of trials that have ended, so that such files are told of in attributes of the study, where
the dashboard looks too (`optuna_dashboard.artifact`, `list_trial_artifacts`, version 0.21).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from optuna.artifacts import FileSystemArtifactStore

from studies.history import load_optuna_study
from studies.storage import Storage

_SPACE = uuid.UUID("c3f6a2de-5b0e-4b6f-9a55-5f5a3a6d2f01")


@dataclass(frozen=True, kw_only=True)
class AttachedFile:
    """A file by its name, as the dashboard shows it."""

    name: str
    content: bytes = field(repr=False)
    mimetype: str = "application/octet-stream"


def attach_files(storage: Storage, name: str, folder: Path, files: Mapping[int, Sequence[AttachedFile]]) -> None:
    """Put `files`, by number of their trial, into the artefacts in `folder`; the study called `name` tells of them.

    Of a trial's files that have one name the last counts. Call it under the study's lease.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(folder)
    study_id = storage.backend.get_study_id_from_name(name)
    attrs = storage.backend.get_study_system_attrs(study_id)
    trials = {trial.number: trial._trial_id for trial in load_optuna_study(storage, name).get_trials(deepcopy=False)}  # noqa: SLF001 - the dashboard keeps files by this id
    with storage.batch():
        for number, attached in files.items():
            prefix = f"dashboard:artifacts:{trials[number]}:"
            for file in attached:
                digest = hashlib.sha256(file.content).hexdigest()
                artifact = str(uuid.uuid5(_SPACE, f"{name} {number} {file.name} {digest}"))
                if prefix + artifact in attrs:
                    continue
                for key in _told(attrs, prefix, file.name):
                    storage.backend.set_study_system_attr(study_id, key, json.dumps(None))
                store.write(artifact, BytesIO(file.content))
                told = {"artifact_id": artifact, "filename": file.name, "mimetype": file.mimetype, "encoding": None}
                storage.backend.set_study_system_attr(study_id, prefix + artifact, json.dumps(told))


def _told(attrs: Mapping[str, object], prefix: str, name: str) -> list[str]:
    """The attributes that tell of a file called `name`."""
    found = {key: json.loads(str(value)) for key, value in attrs.items() if key.startswith(prefix)}
    return [key for key, told in found.items() if told is not None and told["filename"] == name]
