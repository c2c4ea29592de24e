"""Where a study's data lies: its storage, and the folder beside it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from search_spaces.errors import InvalidValueError
from tuner.study_schema import DEFAULT_STORAGE

STORAGE_VARIABLE = "TUNER_STORAGE"
DATA_VARIABLE = "TUNER_DATA"
DEFAULT_FOLDER = Path("tuner-data")


@dataclass(frozen=True, kw_only=True)
class Place:
    """`url` of a storage and the `directory` of what lies beside it: artefacts, predictions, reports, working files."""

    url: str = field(repr=False)
    directory: Path

    @property
    def file(self) -> Path | None:
        """The file behind `url`; None where a server keeps the studies."""
        return _file_of(self.url)

    @property
    def absolute_url(self) -> str:
        """`url`, valid in any working directory of this machine."""
        return self.url if self.file is None else self.url.replace(str(self.file), str(self.file.resolve()), 1)

    @property
    def artifacts(self) -> Path:
        """Artefacts of all studies of the storage, as the dashboard takes them."""
        return self.directory / "artifacts"

    def reports(self, study: str) -> Path:
        """Reports of a study."""
        return self.directory / "reports" / study

    def predictions(self, study: str) -> Path:
        """What the screen of a study turned down, as Parquet files (see `studies.predictions`)."""
        return self.directory / "predictions" / study

    def nodes(self, study: str) -> Path:
        """Measured devices of a study's node pools."""
        return self.directory / "nodes" / f"{study}.json"

    def trials(self, study: str) -> Path:
        """Files of the trials in flight; once a trial is told they are artefacts, and go from here."""
        return self.directory / "work" / study / "trials"

    def deployments(self, study: str) -> Path:
        """Working files of a study's deployments, and the models that they load."""
        return self.directory / "work" / study / "deployments"

    def coordinator(self, study: str) -> Path:
        """Study file and log of a detached coordinator."""
        return self.directory / "work" / study / "coordinator"

    def clear_work(self, study: str) -> None:
        """Remove what a dead run left of trials and deployments; the models stay. Only for the study's one writer."""
        shutil.rmtree(self.trials(study), ignore_errors=True)
        for folder in self.deployments(study).glob("*"):
            if folder.name != "models" and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def find_place(url: str | None) -> Place:
    """The place of `url`, else of the variable TUNER_STORAGE, else of ./tuner-data.

    The folder is that of the database file where there is one, else ./tuner-data; the variable TUNER_DATA overrules.
    """
    chosen = url or os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE
    folder = os.environ.get(DATA_VARIABLE)
    directory = Path(folder) if folder else _folder_of(chosen)
    return Place(url=chosen, directory=directory.resolve())


def existing_place(url: str | None) -> Place:
    """As `find_place`, for reading; raises `InvalidValueError` where a database file is not there."""
    place = find_place(url)
    file = _file_of(place.url)
    if file is not None and not file.exists():
        raise InvalidValueError(
            f"storage {place.url} does not exist; run a study first (tuner study run FILE), "
            f"or name another storage with --storage or the variable {STORAGE_VARIABLE}"
        )
    return place


def _folder_of(url: str) -> Path:
    file = _file_of(url)
    return DEFAULT_FOLDER if file is None else file.parent


def _file_of(url: str) -> Path | None:
    """The file behind `url`: SQLite databases and journal files have one."""
    scheme, _, rest = url.partition("://")
    if scheme == "journal":
        return Path(rest) if rest else None
    database = rest.removeprefix("/").split("?")[0]
    is_file = scheme.split("+")[0] == "sqlite" and rest.startswith("/") and database not in {"", ":memory:"}
    return Path(database) if is_file else None
