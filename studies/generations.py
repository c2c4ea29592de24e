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
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution
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


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Values of a run of a candidate as they are stored, and constraints: at most 0 where they are met."""

    values: tuple[float, ...]
    constraints: tuple[float, ...]


class Generations:
    """The generations of a study, and the children of the next one.

    `study` is the copy: every candidate that was finished, once, with the means of its runs.
    """

    def __init__(self, directions: Sequence[Direction], seed: int, breeding: ScreenedBreeding, population: int) -> None:
        self._breeding = breeding
        self._runs: dict[int, list[_Run]] = {}
        self._individuals: dict[int, FrozenTrial] = {}
        self._distributions: dict[str, BaseDistribution] = {}
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
        run = _Run(values=tuple(trial.values), constraints=tuple(trial.system_attrs.get(LEGACY_KEY, (0.0,))))
        if repeated is None:
            self._runs[trial.number] = [run]
            self._individuals[trial.number] = self._add(trial)
        else:
            self._runs[repeated].append(run)
            mean, individual = _mean(self._runs[repeated]), self._individuals[repeated]
            individual.values = list(mean.values)
            individual.system_attrs = individual.system_attrs | {LEGACY_KEY: list(mean.constraints)}

    def _add(self, trial: FrozenTrial) -> FrozenTrial:
        """The individual that stands for `trial`; distributions, alike in all, are held once."""
        kept = {key: value for key, value in trial.system_attrs.items() if key in (GENERATION, LEGACY_KEY)}
        self.study.add_trial(
            create_trial(values=trial.values, params=trial.params, distributions=trial.distributions, system_attrs=kept)
        )
        individual = self.study.get_trials(deepcopy=False)[-1]
        known = self._distributions
        individual.distributions = {name: known.setdefault(name, d) for name, d in individual.distributions.items()}
        return individual

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


def _mean(runs: Sequence[_Run]) -> _Run:
    """Mean values and constraints of `runs`.

    Runs that failed have no values: they leave the constraint that comes first, `started_and_held`, violated.
    """
    held = [run for run in runs if run.constraints[0] <= 0]
    if not held:
        return runs[0]
    values = tuple(statistics.fmean(column) for column in zip(*(run.values for run in held), strict=True))
    means = [statistics.fmean(column) for column in zip(*(run.constraints for run in held), strict=True)]
    return _Run(values=values, constraints=((len(runs) - len(held)) / len(runs), *means[1:]))
