"""Reading stored studies, without the means to go on with them: the commands that only show need no more."""

from __future__ import annotations

from collections.abc import Sequence

from studies.errors import StudyHalfMadeError
from studies.history import StudyHistory, study_names
from studies.stopping import StopReason, progress_of
from studies.storage import Storage, open_storage
from tuner.places import Place
from tuner.report import StudyReport
from tuner.study_file import parse_study
from tuner.study_schema import StudyFile
from tuner.wiring import make_problem
from tuner.wording import repeats_text


def find_history(storage: Storage, name: str) -> StudyHistory | None:
    """The stored study called `name`; None where there is none, or only its name yet."""
    try:
        return StudyHistory(storage, name) if name in study_names(storage) else None
    except StudyHalfMadeError:
        return None


def history_of(place: Place, name: str) -> StudyHistory:
    """The stored study called `name`; raises `StudyNotFoundError` with the names there are."""
    return StudyHistory(open_storage(place.url), name)


def stored_file(history: StudyHistory, place: Place, overrides: Sequence[str] = ()) -> StudyFile:
    """The study file that a study was made with, after `overrides`, in the storage where it was found."""
    study = parse_study(history.study_file, overrides, name=f"stored study file of {history.name}")
    return study.model_copy(update={"storage": place.url})


def make_report(history: StudyHistory, file: StudyFile) -> StudyReport:
    """The study as it stands."""
    trials = history.trials()
    progress = progress_of(trials)
    ended = history.ended
    done = progress.finished >= file.budget.trials or (ended is not None and ended.is_final)
    status = "finished" if done else "unfinished"
    repeats = f", {repeats_text(progress.repeats)}" if progress.repeats else ""
    why = f" ({ended})" if ended not in {None, StopReason.TRIALS} else ""
    text = f"{status}, {progress.finished} of {file.budget.trials} trials{repeats}{why}"
    return StudyReport(
        name=history.name,
        status=text,
        problem=make_problem(file),
        trials=trials,
        storage=history.storage.url,
        earlier=history.earlier,
        device_use=history.device_use,
        study_file=history.study_file,
    )
