"""The samplers of Optuna, whose suggestions the model screens: NSGA-II (the default), TPE, GP and random.

NSGA-II must know the generation of every trial, so that its children are bred inside Optuna's own `ask`. The others are
asked for suggestions, and what the screen chooses is queued with its parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.samplers.nsgaii import UniformCrossover
from optuna.samplers.nsgaii._child_generation_strategy import NSGAIIChildGenerationStrategy
from optuna.samplers.nsgaii._elite_population_selection_strategy import NSGAIIElitePopulationSelectionStrategy
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from search_spaces.errors import TunerError
from search_spaces.serving import Candidate, OptionValue
from search_spaces.space import Space
from studies.screen import Choice, Request, Screen

CHILDREN = 64
SUGGESTIONS = {"tpe": 8, "gp": 1}
"""Suggestions asked of a sampler for one proposal: each costs TPE some ten milliseconds, GP seconds."""

LARGEST_POPULATION = 50
SMALLEST_POPULATION = 4
PER_TRIAL_IN_FLIGHT = 6


class SamplerKind(StrEnum):
    """Samplers that a study may name."""

    NSGA2 = "nsga2"
    TPE = "tpe"
    GP = "gp"
    RANDOM = "random"


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
    nothing. `expect` announces trials that want children, `take` hands over what was chosen for them.
    """

    def __init__(self, space: Space, screen: Screen, population: int) -> None:
        self._space = space
        self._screen = screen
        self._population = population
        self._request: Request | None = None
        self._choices: list[Choice] = []
        self._last: tuple[optuna.Study, dict[str, BaseDistribution], list[FrozenTrial]] | None = None

    def expect(self, request: Request) -> None:
        """The next call is for `request`."""
        self._request, self._choices = request, []

    def take(self) -> list[Choice]:
        """What was chosen for the expected request; nothing where the sampler did not breed (first generation)."""
        choices, self._request, self._choices = self._choices, None, []
        return choices

    def __call__(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution], parents: list[FrozenTrial]
    ) -> dict[str, Any]:
        """Parameters of a child for Optuna."""
        self._last = (study, search_space, parents)
        request = self._request
        if request is None:
            return {}
        self._choices = self._screen.choose(self.children(request), request)
        genotype = self._space.encode(self._choices[0].candidate)
        return {name: value for name, value in genotype.items() if name in search_space}

    def children(self, request: Request) -> list[Candidate]:
        """The children that would be bred for `request` now, of the parents of the last one; none before it."""
        if self._last is None:
            return []
        study, search_space, parents = self._last
        return self._breed(study, search_space, self._with_latest(study, parents), request)

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


def suggestions(kind: SamplerKind, study: optuna.Study, space: Space, seed: int) -> list[Candidate]:
    """Candidates that a sampler of `kind` suggests after the finished trials of `study`, where nothing is written.

    The sampler is asked on a copy in memory. Raises `TunerError` for one whose package is missing.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    copy = optuna.create_study(
        storage=InMemoryStorage(), sampler=_optuna_sampler(kind, seed), directions=study.directions
    )
    copy.add_trials(study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,)))
    return [_suggestion(copy.ask(), space) for _ in range(SUGGESTIONS.get(kind, CHILDREN))]


def _suggestion(trial: optuna.Trial, space: Space) -> Candidate:
    genotype: dict[str, OptionValue] = {}
    for parameter in space.parameters:
        trial.suggest_categorical(parameter.name, parameter.choices)
        genotype[parameter.name] = trial.params[parameter.name]
    return space.decode(genotype)


def require_sampler(kind: SamplerKind) -> None:
    """Raise `TunerError` where a package that `kind` needs is missing."""
    if kind is SamplerKind.GP and find_spec("torch") is None:
        raise TunerError(
            "sampler gp needs the package torch; install it with: pip install torch, "
            "or choose sampler: nsga2, tpe or random"
        )


def _optuna_sampler(kind: SamplerKind, seed: int) -> BaseSampler:
    require_sampler(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind is SamplerKind.TPE:
            return TPESampler(seed=seed, multivariate=True, constant_liar=True)
        return GPSampler(seed=seed) if kind is SamplerKind.GP else RandomSampler(seed)
