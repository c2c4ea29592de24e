"""Errors of studies: all name the value, the limit and the remedy."""

from __future__ import annotations

from search_spaces.errors import TunerError


class StorageError(TunerError):
    """A storage cannot be opened or used."""


class StorageLostError(StorageError):
    """The storage went away while a study ran; what it holds is consistent, and a resume goes on."""

    exit_code = 75
    """Try again later: EX_TEMPFAIL of <sysexits.h>."""


class StudyFormatError(StorageError):
    """A stored study or trial cannot be read: another schema version, or a damaged attribute."""


class StudyHalfMadeError(StudyFormatError):
    """A study has a name and nothing else: its coordinator is making it, or died when it was."""


class StudyNotFoundError(TunerError):
    """The storage holds no study of that name."""


class StudyExistsError(TunerError):
    """A study of that name exists already."""


class StudyBusyError(TunerError):
    """Another live process writes to the study: `holder` says which and since when, empty where that is not known."""

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


class LeaseLostError(TunerError):
    """This process was the study's coordinator and is not any more: it must stop and write nothing."""


class StudyFileChangedError(TunerError):
    """A study was opened with another study file than it was made with; the text holds the difference."""


class SpaceExhausted(TunerError):  # noqa: N818 - the signal that a search has an end, which the loop expects
    """Every candidate of the space has been measured, is being measured, or cannot run."""
