"""NSGA-II at work: Optuna's sampler, on a copy of the finished trials that this process keeps in memory.

Optuna's `ask` reads the whole storage several times and writes every parameter by itself. On the copy it costs neither;
what it decides (the generation of a trial, the child that is bred) is written to the storage with the trial itself, so
that Optuna finds it there as if it had written it.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.samplers import NSGAIISampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from search_spaces.metrics import Direction
from studies.constraints import LEGACY_KEY
from studies.samplers import ScreenedBreeding, make_sampler
from studies.screen import Choice, Request

GENERATION = "NSGAIISampler:generation"
"""System attribute of a trial under which Optuna's NSGA-II looks for its generation."""


class Generations:
    """The generations of a study, and the children of the next one."""

    def __init__(self, directions: Sequence[Direction], seed: int, breeding: ScreenedBreeding, population: int) -> None:
        self._breeding = breeding
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
        kept = {key: value for key, value in trial.system_attrs.items() if key in (GENERATION, LEGACY_KEY)}
        self.study.add_trial(
            create_trial(values=trial.values, params=trial.params, distributions=trial.distributions, system_attrs=kept)
        )

    def next(self, request: Request | None = None) -> tuple[int, Choice | None]:
        """The generation of the trial that begins now, and the child bred for `request`.

        There is no child in the first generation, nor without a request: for a trial whose candidate is known.
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
