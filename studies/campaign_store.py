"""Where a storage keeps a campaign: attributes of a study of its own, without trials.

The study is called `campaign.NAME`, and so is its lease: who holds that runs the campaign and writes its attributes. An
order is written by anybody, under a key that the runner only reads.
"""

from __future__ import annotations

from typing import cast

import optuna

from studies.codec import Json
from studies.errors import StudyExistsError, StudyNotFoundError
from studies.history import CAMPAIGN_SCHEMA, STUDY_SCHEMA, study_names
from studies.storage import Storage

VERSION = 1
PREFIX = "campaign."


def campaign_study(name: str) -> str:
    """Name of the study, and of the lease, of campaign `name`."""
    return f"{PREFIX}{name}"


def campaign_names(storage: Storage) -> tuple[str, ...]:
    """Names of all campaigns of `storage`."""
    found = (name for name in study_names(storage) if name.startswith(PREFIX))
    return tuple(name.removeprefix(PREFIX) for name in found if _schema(storage, name) == VERSION)


def _schema(storage: Storage, study: str) -> object:
    return _attributes(storage, study).get(CAMPAIGN_SCHEMA)


def _attributes(storage: Storage, study: str) -> dict[str, Json]:
    study_id = storage.backend.get_study_id_from_name(study)
    return cast("dict[str, Json]", storage.backend.get_study_user_attrs(study_id))


class CampaignStore:
    """The attributes of one campaign. Raises `StudyNotFoundError` where the storage has no campaign `name`."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = name
        self.storage = storage
        if name not in campaign_names(storage):
            known = ", ".join(campaign_names(storage)) or "none"
            raise StudyNotFoundError(f"storage {storage.url} has no campaign {name!r}; it has: {known}")
        self._study_id = storage.backend.get_study_id_from_name(campaign_study(name))

    def read(self) -> dict[str, Json]:
        """All attributes, as they are now."""
        return cast("dict[str, Json]", self.storage.backend.get_study_user_attrs(self._study_id))

    def note(self, key: str, value: Json) -> None:
        """Set an attribute."""
        self.storage.backend.set_study_user_attr(self._study_id, key, value)


def create_campaign(storage: Storage, name: str) -> CampaignStore:
    """The campaign `name`, made where the storage has none; its lease is the caller's."""
    study = campaign_study(name)
    if study not in study_names(storage):
        optuna.create_study(storage=storage.backend, study_name=study)
    attributes = _attributes(storage, study)
    if STUDY_SCHEMA in attributes:
        raise StudyExistsError(f"storage {storage.url} has a study {study!r}; choose another name for the campaign")
    if CAMPAIGN_SCHEMA not in attributes:
        storage.backend.set_study_user_attr(storage.backend.get_study_id_from_name(study), CAMPAIGN_SCHEMA, VERSION)
    return CampaignStore(storage, name)
