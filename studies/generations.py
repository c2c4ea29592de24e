"""NSGA-II at work: Optuna's sampler, on a copy of the finished trials that this process keeps in memory.

Optuna's `ask` reads the whole storage several times and writes every parameter by itself. On the copy it costs neither;
what it decides (the generation of a trial, the child that is bred) is written to the storage with the trial itself, so
that Optuna finds it there as if it had written it.

The copy holds every candidate once. A repeat (see `studies.repeats`) is no individual: it moves the values and
constraints of the individual that it repeats to the means of all runs. Finished trials of a storage cannot change,
those of this copy can: nobody else sees them, and memory hands them out themselves (`deepcopy=False`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import optuna
from optuna.samplers import NSGAIISampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from search_spaces.metrics import Direction
from studies.constraints import LEGACY_KEY
from studies.records import PROPOSAL
from studies.samplers import ScreenedBreeding, make_sampler
from studies.screen import Choice, Request

GENERATION = "NSGAIISampler:generation"
"""System attribute of a trial under which Optuna's NSGA-II looks for its generation."""


class Generations:
    """The generations of a study, and the children of the next one.

    `study` is the copy: every candidate that was finished, once, with the means of its runs.
    """

    def __init__(self, directions: Sequence[Direction], seed: int, breeding: ScreenedBreeding, population: int) -> None:
        self._breeding = breeding
        self._runs: dict[int, list[FrozenTrial]] = {}
        self._individuals: dict[int, FrozenTrial] = {}
        self._known: set[int] = set()
        self.sampler: NSGAIISampler = make_sampler(seed, population, breeding)
        self.study = optuna.create_study(
            storage=InMemoryStorage(),
            sampler=self.sampler,
            directions=[StudyDirection[direction.name] for direction in directions],
        )

    def add(self, trial: FrozenTrial) -> None:
        """Take over a finished trial; one that is not complete teaches nothing."""
        if trial.state is not OptunaState.COMPLETE or trial.number in self._known:
            return
        self._known.add(trial.number)
        repeated = trial.user_attrs.get(PROPOSAL, {}).get("repeat_of")
        if repeated is None:
            self._runs[trial.number] = [trial]
            self.study.add_trial(_individual([trial]))
            self._individuals[trial.number] = self.study.get_trials(deepcopy=False)[-1]
        else:
            self._runs[repeated].append(trial)
            mean, individual = _individual(self._runs[repeated]), self._individuals[repeated]
            individual.values, individual.system_attrs = mean.values, mean.system_attrs

    def next(self, request: Request | None = None) -> tuple[int, list[Choice]]:
        """The generation of the trials that begin now, and the children bred for `request`.

        All trials that begin before the next one is told are of one generation. There are no children in the first one,
        nor without a request: for trials whose candidates are known.
        """
        trial = self.study.ask()
        try:
            if request is not None:
                self._breeding.expect(request)
            _ = trial.relative_params  # Optuna sets the generation, and breeds
            frozen = self.study.get_trials(deepcopy=False)[trial.number]
            return self.sampler.get_trial_generation(self.study, frozen), self._breeding.take()
        finally:
            self.study.tell(trial, state=OptunaState.FAIL)


def _individual(runs: Sequence[FrozenTrial]) -> FrozenTrial:
    """The first of `runs` with their mean values and constraints, as the copy takes it.

    Runs that failed have no values: they leave the constraint that comes first, `started_and_held`, violated.
    """
    first = runs[0]
    kept = {key: value for key, value in first.system_attrs.items() if key in (GENERATION, LEGACY_KEY)}
    values = first.values
    held = [run for run in runs if run.system_attrs.get(LEGACY_KEY, [0.0])[0] <= 0]
    if len(runs) > 1 and held:
        values = [statistics.fmean(column) for column in zip(*(run.values for run in held), strict=True)]
        constraints = [run.system_attrs.get(LEGACY_KEY, [0.0]) for run in held]
        means = [statistics.fmean(column) for column in zip(*constraints, strict=True)]
        kept[LEGACY_KEY] = [(len(runs) - len(held)) / len(runs), *means[1:]]
    return create_trial(values=values, params=first.params, distributions=first.distributions, system_attrs=kept)
