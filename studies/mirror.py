"""The trials of a study as its one writer knows them: read once, then kept up by what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from studies.records import TrialRecord, decode_trial


class Mirror:
    """Records by number. Reading a study from its storage costs more with every trial in flight; this does not.

    `seen` gets every trial as Optuna has it when it is read: all of them once, and each one that was refreshed.
    """

    def __init__(self, backend: BaseStorage, study_id: int, seen: Callable[[FrozenTrial], None]) -> None:
        self._backend = backend
        self._study_id = study_id
        self._seen = seen
        self._ids: list[int] = []
        self._records: list[TrialRecord] = []
        for trial in backend.get_all_trials(study_id, deepcopy=False):
            self._append(backend.get_trial_id_from_study_id_trial_number(study_id, trial.number), trial)

    @property
    def records(self) -> Sequence[TrialRecord]:
        """All trials by number; not to be changed."""
        return self._records

    def trial_id(self, number: int) -> int:
        """Optuna's id of trial `number`."""
        return self._ids[number]

    def read_new(self) -> None:
        """Take over the trials that were added since: by this writer, or by programs that queue trials."""
        while (trial_id := self._next_id()) is not None:
            self._append(trial_id, self._backend.get_trial(trial_id))

    def refresh(self, number: int) -> FrozenTrial:
        """Read trial `number` again, and return it as Optuna has it."""
        trial = self._backend.get_trial(self._ids[number])
        self._records[number] = decode_trial(trial)
        self._seen(trial)
        return trial

    def _next_id(self) -> int | None:
        try:
            return self._backend.get_trial_id_from_study_id_trial_number(self._study_id, len(self._ids))
        except KeyError:
            return None

    def _append(self, trial_id: int, trial: FrozenTrial) -> None:
        self._ids.append(trial_id)
        self._records.append(decode_trial(trial))
        self._seen(trial)
