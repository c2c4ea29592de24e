"""The public Python API: what the commands do, importable and typed, with the same names.

`from tuner import load_study, predict` and so on. Everything raises `TunerError` (or a kind of it) for what a user can
mend, with the value, the limit and the remedy. Only `run_study` launches anything and writes to a storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from search_spaces.errors import TunerError
from search_spaces.slos import Slo
from studies.history import StudyHistory, StudySummary, summaries
from studies.records import TrialRecord
from studies.storage import open_storage
from tuner.comparison import Comparison
from tuner.comparison import compare as compare_reports
from tuner.importance import Importance
from tuner.importance import importance as importance_of
from tuner.observer import Observer
from tuner.places import Place, existing_place, find_place
from tuner.prediction import Outlook, look_out
from tuner.report import StudyReport
from tuner.score import Scored, ranked
from tuner.score_cli import with_slos
from tuner.stored import history_of, make_report, stored_file
from tuner.study_file import load_study_file as read_study_file
from tuner.study_schema import StudyFile
from tuner.whatif import WhatIf, what_if
from tuner.wiring import make_problem

__all__ = [
    "Comparison",
    "Importance",
    "Outlook",
    "Scored",
    "Study",
    "StudyFile",
    "StudyReport",
    "TunerError",
    "WhatIf",
    "compare",
    "list_studies",
    "load_study",
    "load_study_file",
    "predict",
    "run_study",
]


@dataclass(frozen=True)
class Study:
    """A stored study, read anew at each question; `load_study` finds one."""

    history: StudyHistory
    place: Place

    @property
    def name(self) -> str:
        """Its name."""
        return self.history.name

    @property
    def file(self) -> StudyFile:
        """The study file that it was made with."""
        return stored_file(self.history, self.place)

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """Every trial, repeats and failures included."""
        return self.history.trials()

    def report(self) -> StudyReport:
        """The study as it stands: candidates with the means of their runs, intervals, noise (`tuner study show`)."""
        return make_report(self.history, self.file)

    def pareto(self) -> tuple[TrialRecord, ...]:
        """The Pareto front, best first in the first objective (`tuner study pareto`)."""
        return self.report().front

    def rescore(self, slos: Sequence[str] = (), by: Sequence[str] = ()) -> tuple[Scored, ...]:
        """The measured configurations ranked under changed SLOs (`METRIC=THRESHOLD`, as `tuner study rescore`)."""
        problem = make_problem(with_slos(self.history, self.place, slos))
        objectives = tuple(by) or tuple(objective.metric for objective in problem.objectives)
        return ranked(self.trials, objectives, problem.slos)

    def whatif(self, *settings: str, trial: int | Literal["best"] = "best") -> WhatIf:
        """What the corrected model says with `settings` changed (`KEY=VALUE`, as `tuner whatif`)."""
        return what_if(self.history, self.place, settings, trial=str(trial))

    def importance(self, evaluator: Literal["auto", "fanova", "ped-anova"] = "auto") -> Importance:
        """How much each parameter matters, measured and as the model sees it (`tuner study importance`)."""
        return importance_of(self.history, self.place, evaluator=evaluator)


def load_study(name: str, storage: str | None = None) -> Study:
    """The stored study called `name`; `storage` is a URL, TUNER_STORAGE or ./tuner-data by default.

    Raises `StudyNotFoundError` with the names there are.
    """
    place = existing_place(storage)
    return Study(history_of(place, name), place)


def list_studies(storage: str | None = None) -> tuple[StudySummary, ...]:
    """The studies of a storage (`tuner study list`)."""
    return summaries(open_storage(existing_place(storage).url))


def load_study_file(path: str | Path, *overrides: str) -> StudyFile:
    """The checked study file at `path` over its layers, after `overrides` (`budget.trials=8`).

    Raises `StudyFileError`, which lists every problem at once.
    """
    return read_study_file(Path(path), overrides)


def predict(study: StudyFile | str | Path, *overrides: str, top: int = 5) -> Outlook:
    """What the model alone expects of the default configurations and the `top` of a sample (`tuner predict`).

    `overrides` are for a path: a `StudyFile` has had its own.
    """
    if isinstance(study, StudyFile):
        if overrides:
            raise TunerError(f"{overrides[0]}: give overrides to load_study_file, which makes the study file")
        return look_out(study, top=top)
    return look_out(load_study_file(study, *overrides), top=top)


def compare(*studies: Study, objectives: Sequence[str] | None = None, slos: Sequence[Slo] | None = None) -> Comparison:
    """Hold studies against each other by what they measured (`tuner study compare`).

    Objectives and SLOs are those of the first one unless given.
    """
    return compare_reports([study.report() for study in studies], objectives=objectives, slos=slos)


def run_study(
    study: StudyFile | str | Path,
    *,
    storage: str | None = None,
    address: str | None = None,
    observer: Observer | None = None,
) -> Study:
    """Run a study to its end, or go on with one that was begun (`tuner study run`), and return it.

    `address` is that of a Ray cluster, None for this machine. Without an `observer` lines of progress go to stderr.
    """
    from rich.console import Console

    from tuner import session, wiring
    from tuner.progress import LineProgress

    file = study if isinstance(study, StudyFile) else load_study_file(study)
    place = find_place(storage or (file.storage if "storage" in file.model_fields_set else None))
    connect = wiring.connector(address, file)

    def never() -> bool:
        return False

    with LineProgress(Console(stderr=True)) if observer is None else nullcontext(observer) as watching:
        session.run_study(file, place, connect=connect, stop=nullcontext(never), observer=watching)
    return load_study(file.name, place.url)
