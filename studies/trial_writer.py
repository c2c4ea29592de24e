"""What is written of a trial, each step as one transaction of the storage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from search_spaces.outcome import Failure, Measurement, Outcome
from search_spaces.space import Space
from studies.codec import Json, to_json
from studies.constraints import write_constraints
from studies.generations import GENERATION
from studies.records import (
    EMULATED,
    EMULATED_NOTE,
    OUTCOME,
    PROPOSAL,
    STATUS,
    VIOLATIONS,
    Plan,
    TrialStatus,
    encode_outcome,
    encode_plan,
)
from studies.storage import Storage


@dataclass(frozen=True, kw_only=True)
class TrialWriter:
    """Writes to the trials of one study under the lease `lease`; trials are named by Optuna's id."""

    storage: Storage
    study_id: int
    space: Space
    lease: str
    artifacts: FileSystemArtifactStore

    def queue(self, plan: Plan) -> None:
        """A new trial that waits, with all its parameters and its plan."""
        self._create(plan, OptunaState.WAITING, {PROPOSAL: encode_plan(plan)}, {})

    def begin(self, plan: Plan, generation: int) -> int:
        """A new trial that runs; returns its number."""
        trial_id = self._create(plan, OptunaState.RUNNING, self._running_attrs(plan), {GENERATION: generation})
        return self.storage.direct.get_trial_number_from_id(trial_id)

    def start(self, trial_id: int, known: Collection[str], plan: Plan, generation: int | None) -> None:
        """Let a trial that waits run; parameters are added to those that are `known` of it.

        A repeat belongs to no generation.
        """
        backend = self.storage.direct
        with self.storage.batch():
            for name, value in self.space.encode(plan.candidate).items():
                if name not in known:
                    distribution = self._distributions()[name]
                    internal = distribution.to_internal_repr(value)
                    backend.set_trial_param(trial_id, name, internal, distribution)
            for key, attr in self._running_attrs(plan).items():
                backend.set_trial_user_attr(trial_id, key, attr)
            if generation is not None:
                backend.set_trial_system_attr(trial_id, GENERATION, generation)
            backend.set_trial_state_values(trial_id, OptunaState.RUNNING)

    def refuse(self, trial_id: int) -> None:
        """End a trial that shall not be measured."""
        self.storage.direct.set_trial_state_values(trial_id, OptunaState.FAIL)

    def note_outcome(self, trial_id: int, outcome: Outcome) -> None:
        """Copy the artefacts to where the dashboard finds them, and store the outcome with their ids.

        A file that is gone is noted as `missing`.
        """
        backend = self.storage.direct
        with self.storage.batch():
            ids = self._upload(trial_id, outcome.artifacts)
            if isinstance(outcome, Measurement) and outcome.emulated:
                backend.set_trial_user_attr(trial_id, EMULATED, EMULATED_NOTE)
            backend.set_trial_user_attr(trial_id, OUTCOME, encode_outcome(outcome, ids))

    def complete(
        self,
        trial_id: int,
        attrs: Mapping[str, Json],
        names: Sequence[str],
        violations: Mapping[str, float],
        values: Sequence[float],
    ) -> None:
        """Finish a trial with `values`; `names` orders its constraints."""
        with self.storage.batch():
            for key, attr in {**attrs, VIOLATIONS: to_json(violations)}.items():
                self.storage.direct.set_trial_user_attr(trial_id, key, attr)
            write_constraints(self.storage.direct, trial_id, names, violations)
            self.storage.direct.set_trial_state_values(trial_id, OptunaState.COMPLETE, list(values))

    def note_study(self, key: str, value: Json) -> None:
        """Set the attribute `key` of the study itself."""
        self.storage.direct.set_study_user_attr(self.study_id, key, value)

    def lose(self, trial_id: int, failure: Failure | None) -> None:
        """End a trial as lost; `failure` is its outcome where none is stored yet."""
        with self.storage.batch():
            if failure is not None:
                self.storage.direct.set_trial_user_attr(trial_id, OUTCOME, encode_outcome(failure, {}))
            self.storage.direct.set_trial_user_attr(trial_id, STATUS, TrialStatus.LOST.value)
            self.storage.direct.set_trial_state_values(trial_id, OptunaState.FAIL)

    def _create(
        self, plan: Plan, state: OptunaState, user_attrs: Mapping[str, Json], system_attrs: Mapping[str, Json]
    ) -> int:
        template = create_trial(
            state=state,
            params=dict(self.space.encode(plan.candidate)),
            distributions=dict(self._distributions()),
            user_attrs=dict(user_attrs),
            system_attrs=dict(system_attrs),
        )
        template.datetime_start = datetime.now() if state is OptunaState.RUNNING else None  # noqa: DTZ005 - as Optuna
        return self.storage.direct.create_new_trial(self.study_id, template_trial=template)

    def _running_attrs(self, plan: Plan) -> dict[str, Json]:
        proposal = encode_plan(replace(plan, lease=self.lease))
        return {PROPOSAL: proposal, STATUS: TrialStatus.RUNNING.value}

    def _distributions(self) -> dict[str, CategoricalDistribution]:
        return {p.name: CategoricalDistribution(p.choices) for p in self.space.parameters}

    def _upload(self, trial_id: int, files: Mapping[str, str]) -> dict[str, str]:
        there = {name: path for name, path in files.items() if Path(path).is_file()}
        ids = dict.fromkeys(files, "missing")
        if there:
            trial = self.storage.direct.get_trial(trial_id)
            for name, path in there.items():
                ids[name] = upload_artifact(
                    artifact_store=self.artifacts, file_path=path, study_or_trial=trial, storage=self.storage.direct
                )
        return ids
