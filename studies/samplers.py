"""NSGA-II, named explicitly, whose children the model screens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import NSGAIISampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.samplers.nsgaii import UniformCrossover
from optuna.samplers.nsgaii._child_generation_strategy import NSGAIIChildGenerationStrategy
from optuna.samplers.nsgaii._elite_population_selection_strategy import NSGAIIElitePopulationSelectionStrategy
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from search_spaces.serving import Candidate, OptionValue
from search_spaces.space import Space
from studies.screen import Choice, Request, Screen

CHILDREN = 64
LARGEST_POPULATION = 50
SMALLEST_POPULATION = 4
PER_TRIAL_IN_FLIGHT = 6


def population_size(budget_trials: int, in_flight: int) -> int:
    """Trials of one generation: a quarter of the budget, at most 50, and at least 6 for each trial in flight.

    NSGA-II takes the parents of a generation at its first ask. With fewer than 6 trials of a generation for each one in
    flight, an eighth of them and more would be told too late (measured on Optuna 5.0).
    """
    by_budget = min(LARGEST_POPULATION, budget_trials // 4)
    return max(SMALLEST_POPULATION, PER_TRIAL_IN_FLIGHT * in_flight, by_budget)


def make_sampler(seed: int, population: int, breeding: ScreenedBreeding) -> NSGAIISampler:
    """The sampler; `breeding` makes its children from the second generation on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return NSGAIISampler(population_size=population, seed=seed, child_generation_strategy=breeding)


class ScreenedBreeding:
    """The child generation strategy of NSGA-II: breeds `CHILDREN` children and returns the one the screen chooses.

    A trial that waits in the queue has its parameters already; it passes here only to be given its generation, and gets
    nothing. `expect` announces a trial that wants a child, `take` hands over what was chosen for it.
    """

    def __init__(self, space: Space, screen: Screen, population: int) -> None:
        self._space = space
        self._screen = screen
        self._population = population
        self._request: Request | None = None
        self._choice: Choice | None = None

    def expect(self, request: Request) -> None:
        """The next call is for `request`."""
        self._request, self._choice = request, None

    def take(self) -> Choice | None:
        """What was chosen for the expected request; None where the sampler did not breed (first generation)."""
        choice, self._request, self._choice = self._choice, None, None
        return choice

    def __call__(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution], parents: list[FrozenTrial]
    ) -> dict[str, Any]:
        """Parameters of a child for Optuna."""
        request = self._request
        if request is None:
            return {}
        current = self._with_latest(study, parents)
        children = self._breed(study, search_space, current, request)
        self._choice = self._screen.choose(children, request)
        genotype = self._space.encode(self._choice.candidate)
        return {name: value for name, value in genotype.items() if name in search_space}

    def _with_latest(self, study: optuna.Study, parents: list[FrozenTrial]) -> list[FrozenTrial]:
        """The elite of `parents` and of the trials told last.

        Optuna fixes the parents at the first ask of a generation; a trial that is told later would never breed.
        """
        latest = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))[-2 * self._population :]
        pool = {trial.number: trial for trial in (*parents, *latest) if trial.params}
        select = NSGAIIElitePopulationSelectionStrategy(population_size=self._population)
        return select(study, list(pool.values()))

    def _breed(
        self,
        study: optuna.Study,
        search_space: dict[str, BaseDistribution],
        parents: list[FrozenTrial],
        request: Request,
    ) -> list[Candidate]:
        crossover = UniformCrossover(swapping_prob=0.5)
        strategy = NSGAIIChildGenerationStrategy(
            crossover=crossover,
            crossover_prob=0.9,
            swapping_prob=0.5,
            rng=LazyRandomState(self._screen.numpy_seed(request.number)),
        )
        rng = self._screen.rng(request.number)
        return [self._filled(strategy(study, search_space, parents), rng.choice) for _ in range(CHILDREN)]

    def _filled(
        self, child: Mapping[str, OptionValue], choose: Callable[[Sequence[OptionValue]], OptionValue]
    ) -> Candidate:
        """Decode `child`; a mutated parameter is absent from it and is drawn anew."""
        genotype = {p.name: child[p.name] if p.name in child else choose(p.choices) for p in self._space.parameters}
        return self._space.decode(genotype)
