"""The screen: out of many candidates, the one most worth measuring next."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from search_spaces.errors import require
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, ServingConfig
from search_spaces.space import Space
from studies.errors import SpaceExhausted
from studies.holding import Suspicions
from studies.pareto import front
from studies.predictions import PredictionLog, Rejected
from studies.records import Origin, TrialRecord
from studies.worth import Appraiser, Option, Shared, Worth

Predict = Callable[[Sequence[Candidate]], list[Prediction]]

SAMPLED, INCUMBENTS, REFINED = 96, 6, 6
"""Random candidates of a proposal; members of the front, and the model's favourites, whose neighbours are looked at."""

NEIGHBOURHOODS = 64
"""Candidates whose neighbours are remembered."""

THOUGHT_AT_ONCE = 32
"""Candidates that are predicted in one step of thinking ahead: some tens of milliseconds."""

UNSCREENED_EVERY = 10
HOPELESS = 0.1
"""Even an unscreened proposal starts and holds with this probability."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the screen knows when trial `number` is asked for.

    `tried` holds the keys that must not be proposed; `warm` the configurations whose deployments are up. `count` trials
    are asked for at once, with the numbers from `number` on. `crowded` names node pools that nothing more is to be
    chosen for while others have room.
    """

    number: int
    trials: Sequence[TrialRecord]
    tried: AbstractSet[str]
    warm: tuple[ServingConfig, ...] = ()
    count: int = 1
    crowded: AbstractSet[str] = frozenset()

    def has_room_for(self, config: ServingConfig) -> bool:
        """False where a pool of `config` would run on a crowded node pool."""
        return not any(pool.node_pool in self.crowded for pool in config.pools)

    @property
    def unscreened(self) -> tuple[bool, ...]:
        """Of each trial asked for, True for one in ten, by its number."""
        numbers = range(self.number, self.number + self.count)
        return tuple(number % UNSCREENED_EVERY == UNSCREENED_EVERY - 1 for number in numbers)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the screen chose.

    `expected_gain` is the largest expected growth of the hypervolume that it saw, relative to what is held; None where
    it did not choose by that or saw only what has room, and for all but the first of those that were chosen together:
    they were seen once.
    """

    candidate: Candidate
    key: str
    origin: Origin
    prediction: Prediction | None
    expected_gain: float | None = None


@dataclass(frozen=True, kw_only=True)
class Handed:
    """What earlier studies hand over beside the corrections of the model.

    `hints` are candidates that the screen looks at whenever it chooses, and measures where its model says so.
    `suspected` is what failed there.
    """

    hints: tuple[Candidate, ...] = ()
    suspected: Suspicions = field(default_factory=dict)


@dataclass
class _Seen:
    """What was looked at for a proposal: what can run, and what cannot with the reason."""

    options: list[Option] = field(default_factory=list)
    turned_down: list[tuple[Candidate, str]] = field(default_factory=list)


class Screen:
    """Chooses candidates with a model; without one, the first that is new and can run."""

    def __init__(
        self,
        problem: Problem,
        space: Space,
        seed: int,
        predict: Predict | None,
        log: PredictionLog,
        shared: Shared | None = None,
        handed: Handed | None = None,
    ) -> None:
        self._problem = problem
        self._shared = shared
        self._space = space
        self._seed = seed
        self._predict = predict
        self._log = log
        self._suspected = handed.suspected if handed else {}
        self._hints = {candidate.key: candidate for candidate in (handed.hints if handed else ())}
        self._genotypes = all_candidates(space)
        self._near: dict[Candidate, tuple[Candidate, ...]] = {}
        self._witness: tuple[str, Candidate] | None = None

    def rng(self, number: int) -> random.Random:
        """The random numbers of trial `number`: the same whenever it is asked for."""
        return random.Random(f"{self._seed}:{number}")  # noqa: S311 - a search, no secret

    def numpy_seed(self, number: int) -> int:
        """A seed for NumPy, as `rng`."""
        digest = hashlib.sha256(f"{self._seed}:{number}:breed".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def predict_one(self, candidate: Candidate) -> Prediction | None:
        """Prediction of a candidate that is proposed whatever the model says."""
        return self._predict([candidate])[0] if self._predict else None

    def require_untried(self, tried: AbstractSet[str], number: int) -> None:
        """Raise `SpaceExhausted` unless some candidate that can run has not been tried.

        A few random draws answer for a large space; otherwise the genotypes are walked through once over the life of
        the study, up to the first that will do.
        """
        rng = self.rng(number)
        for _ in range(16):
            candidate = self._space.sample(rng)
            if candidate.key not in tried and infeasibility(candidate, self._problem) is None:
                return
        if self._next_untried(tried) is None:
            raise SpaceExhausted(
                f"all candidates of the space ({self._space.size} genotypes) have been tried or cannot run; "
                "widen the space or lower the budget"
            )

    def choose(self, suggested: Sequence[Candidate], request: Request) -> list[Choice]:
        """The candidates most worth measuring, no two alike; one in ten is not chosen by the model.

        There are `request.count` of them, or fewer at the end of the space; raises `SpaceExhausted` for none.
        """
        steps = self.choosing(suggested, request)
        while True:
            try:
                next(steps)
            except StopIteration as ended:
                chosen: list[Choice] = ended.value
                return chosen

    def choosing(
        self, suggested: Sequence[Candidate], request: Request, at_once: int | None = None
    ) -> Generator[None, None, list[Choice]]:
        """`choose` in steps: `at_once` candidates are predicted in each, some tens of milliseconds."""
        screened = 0 if self._predict is None else request.unscreened.count(False)
        one = replace(request, count=screened)
        found = (yield from self._screened(suggested, one, at_once)) if screened else []
        choices: list[Choice] = []
        for index, unscreened in enumerate(request.unscreened):
            if found and not unscreened:
                choices.append(found.pop(0))
                continue
            tried = request.tried | {choice.key for choice in (*choices, *found)}
            try:
                one = replace(request, number=request.number + index, tried=tried, count=1)
                choices.append(self._unscreened(suggested, one))
            except SpaceExhausted:
                break
        if not choices:
            raise SpaceExhausted("every candidate of the space has been tried or cannot run")
        return choices

    def _screened(
        self, suggested: Sequence[Candidate], request: Request, at_once: int | None
    ) -> Generator[None, None, list[Choice]]:
        """What the model chooses among all that was looked at; where nothing has room, among what has none."""
        appraiser = self._appraiser(request)
        seen = yield from self._look(appraiser, suggested, request, at_once)
        self._note(seen, request)
        if seen.options:
            yield
            return self._decide(seen.options, appraiser.appraise(seen.options, request.count), request)
        if request.crowded:
            return (yield from self._screened(suggested, replace(request, crowded=frozenset()), at_once))
        return []

    def _look(
        self, appraiser: Appraiser, suggested: Sequence[Candidate], request: Request, at_once: int | None
    ) -> Generator[None, None, _Seen]:
        """Predictions of `suggested` and of those that the screen itself thinks of.

        Those are hints, warm deployments under other loads, neighbours of the front, a random sample, and neighbours
        of what the model likes best of all these.
        """
        seen = _Seen()
        yield from self._predict_into(
            seen, self._fresh(self._pool(suggested, request), request, seen), at_once, request
        )
        if seen.options:
            best = appraiser.appraise(seen.options).order[:REFINED]
            yield
            near = [other for index in best for other in self._neighbours(seen.options[index].candidate)]
            yield from self._predict_into(seen, self._fresh(near, request, seen), at_once, request)
        return seen

    def _appraiser(self, request: Request) -> Appraiser:
        seed = self.numpy_seed(request.number)
        return Appraiser(self._problem, request.trials, seed, self._shared, self._suspected)

    def _pool(self, suggested: Sequence[Candidate], request: Request) -> list[Candidate]:
        own = (*self._warm_candidates(request), *self._around_front(request), *self._sample(request))
        return [*suggested, *self._hints.values(), *own]

    def think(self, suggested: Sequence[Candidate], request: Request) -> Iterator[None]:
        """Predict what `choose` will want to know, `THOUGHT_AT_ONCE` candidates a step: a model remembers its answers.

        What differs in `choose` are the trials told meanwhile: most of the candidates are the same.
        """
        if self._predict is not None and not all(request.unscreened):
            yield from self._look(self._appraiser(request), suggested, request, THOUGHT_AT_ONCE)

    def _decide(self, options: Sequence[Option], worth: Worth, request: Request) -> list[Choice]:
        """What `worth` chose; the others are written down."""
        rates = dict(zip(worth.order.tolist(), worth.rates.tolist(), strict=True))
        for index, option in enumerate(options):
            if index not in worth.chosen and not self._log.is_known(option.key, "outscored"):
                rejected = self._rejected(request, option.candidate, option.key, "outscored")
                self._log.add(replace(rejected, metrics=option.prediction.metrics, score=rates.get(index)))
        return [
            Choice(
                candidate=chosen.candidate,
                key=chosen.key,
                origin=self._origin(chosen),
                prediction=chosen.prediction,
                expected_gain=worth.gain if place == 0 and not request.crowded else None,
            )
            for place, chosen in enumerate(options[index] for index in worth.chosen)
        ]

    def _origin(self, chosen: Option) -> Origin:
        if chosen.is_warm:
            return Origin.WARM
        return Origin.SEED if chosen.key in self._hints else Origin.SCREENED

    def _unscreened(self, suggested: Sequence[Candidate], request: Request) -> Choice:
        """The first new candidate that failures do not speak against, whatever the model says; else any untried one."""
        appraiser = self._appraiser(request)
        seen = _Seen()
        pool = self._holding(self._fresh(suggested, request, seen), appraiser)
        pool = pool or self._holding(self._fresh(self._sample(request), request, seen), appraiser)
        pool = pool or self._fresh(self._sample(request), replace(request, crowded=frozenset()), seen)
        self._note(seen, request)
        found = next(iter(pool.items()), None) or self._next_untried(request.tried)
        if found is None:
            raise SpaceExhausted("every candidate of the space has been tried or cannot run")
        key, candidate = found
        prediction = self.predict_one(candidate)
        return Choice(candidate=candidate, key=key, origin=Origin.UNSCREENED, prediction=prediction)

    def _holding(self, fresh: dict[str, Candidate], appraiser: Appraiser) -> dict[str, Candidate]:
        """Those of `fresh` that what failed so far does not speak against."""
        if not fresh:
            return fresh
        chances = appraiser.holds(list(fresh.values()))
        return {key: c for (key, c), chance in zip(fresh.items(), chances, strict=True) if chance >= HOPELESS}

    def _sample(self, request: Request) -> list[Candidate]:
        rng = self.rng(request.number)
        return [self._space.sample(rng) for _ in range(SAMPLED)]

    def _around_front(self, request: Request) -> list[Candidate]:
        """Neighbours of the front's members, those of the last ones where there are too many."""
        directions = [objective.direction for objective in self._problem.objectives]
        members = sorted(front(request.trials, directions), key=lambda trial: trial.number)[-INCUMBENTS:]
        return [other for trial in members if trial.candidate for other in self._neighbours(trial.candidate)]

    def _neighbours(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """As the space has them; those of the front are wanted at every ask."""
        found = self._near.pop(candidate, None) or tuple(self._space.neighbours(candidate))
        self._near[candidate] = found  # at the end: it was wanted last
        if len(self._near) > NEIGHBOURHOODS:
            del self._near[next(iter(self._near))]
        return found

    def _warm_candidates(self, request: Request) -> list[Candidate]:
        """The deployments that are up, under every load of the space."""
        known = {t.candidate.config: t.candidate for t in request.trials if t.candidate is not None}
        up = [known[config] for config in request.warm if config in known]
        return [other for candidate in up for other in (candidate, *self._space.same_config(candidate))]

    def _fresh(self, candidates: Sequence[Candidate], request: Request, seen: _Seen) -> dict[str, Candidate]:
        """The distinct `candidates` by key that have room, were not `seen` or tried and that no rule forbids."""
        known = {option.key for option in seen.options}
        fresh: dict[str, Candidate] = {}
        for candidate in dict.fromkeys(candidates):
            key = candidate.key
            if not request.has_room_for(candidate.config) or key in request.tried or key in fresh or key in known:
                continue
            reason = infeasibility(candidate, self._problem)
            if reason is None:
                fresh[key] = candidate
            else:
                seen.turned_down.append((candidate, f"infeasible: {reason}"))
        return fresh

    def _predict_into(
        self, seen: _Seen, fresh: dict[str, Candidate], at_once: int | None, request: Request
    ) -> Generator[None, None, None]:
        """Those of `fresh` that the model expects to run become options."""
        candidates = list(fresh.values())
        for first in range(0, len(candidates), at_once or max(1, len(candidates))):
            part = candidates[first : first + (at_once or len(candidates))]
            predictions = self._predict(part) if self._predict else []
            require(len(predictions) == len(part), f"the model gave {len(predictions)} predictions for {len(part)}")
            for candidate, said in zip(part, predictions, strict=True):
                if said.infeasible is None:
                    is_warm = candidate.config in request.warm
                    option = Option(candidate=candidate, key=candidate.key, prediction=said, is_warm=is_warm)
                    seen.options.append(option)
                else:
                    seen.turned_down.append((candidate, f"predicted: {said.infeasible}"))
            yield

    def _note(self, seen: _Seen, request: Request) -> None:
        """Write down what cannot run."""
        for candidate, reason in seen.turned_down:
            if not self._log.is_known(candidate.key, reason):
                self._log.add(self._rejected(request, candidate, candidate.key, reason))

    def _rejected(self, request: Request, candidate: Candidate, key: str, reason: str) -> Rejected:
        genotype = self._space.encode(candidate)
        return Rejected(trial=request.number, key=key, genotype=genotype, metrics={}, score=None, reason=reason)

    def _next_untried(self, tried: AbstractSet[str]) -> tuple[str, Candidate] | None:
        while self._witness is None or self._witness[0] in tried:
            candidate = next(self._genotypes, None)
            if candidate is None:
                return None
            if infeasibility(candidate, self._problem) is None:
                self._witness = (candidate.key, candidate)
        return self._witness


def all_candidates(space: Space) -> Iterator[Candidate]:
    """The candidate of every genotype of `space`, in order; several genotypes may give the same one."""
    names = [parameter.name for parameter in space.parameters]
    for values in itertools.product(*(parameter.choices for parameter in space.parameters)):
        yield space.decode(dict(zip(names, values, strict=True)))
