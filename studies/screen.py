"""The screen: out of many candidates, the one most worth measuring next."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import moocore
import numpy as np

from search_spaces.errors import require
from search_spaces.metrics import Direction
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, Mode, ServingConfig
from search_spaces.space import Space
from studies.errors import SpaceExhausted
from studies.pareto import Points
from studies.predictions import PredictionLog, Rejected
from studies.records import Origin, TrialRecord
from studies.scoring import Score, Scorer

Predict = Callable[[Sequence[Candidate]], list[Prediction]]

SEED_POOL = 256
UNSCREENED_EVERY = 10
MINIMUM_FEASIBILITY = 0.1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the screen knows when trial `number` is asked for.

    `tried` holds the keys that must not be proposed; `warm` the configurations whose deployments are up.
    """

    number: int
    trials: Sequence[TrialRecord]
    tried: AbstractSet[str]
    warm: tuple[ServingConfig, ...] = ()

    @property
    def is_unscreened(self) -> bool:
        """True for one proposal in ten, by its number."""
        return self.number % UNSCREENED_EVERY == UNSCREENED_EVERY - 1


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the screen chose."""

    candidate: Candidate
    key: str
    origin: Origin
    prediction: Prediction | None


@dataclass(frozen=True, kw_only=True)
class _Option:
    candidate: Candidate
    key: str
    prediction: Prediction


class Screen:
    """Chooses candidates with a model; without one, the first that is new and can run."""

    def __init__(self, problem: Problem, space: Space, seed: int, predict: Predict | None, log: PredictionLog) -> None:
        self._problem = problem
        self._space = space
        self._seed = seed
        self._predict = predict
        self._log = log
        self._genotypes = all_candidates(space)
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

    def choose_seed(self, request: Request) -> Choice:
        """A candidate of the first generation: near the predicted front, far from what was tried, modes in turn."""
        rng = self.rng(request.number)
        fresh = self._fresh([self._space.sample(rng) for _ in range(SEED_POOL)], request)
        if self._predict is None or request.is_unscreened:
            return self._unscreened(fresh, request)
        options = self._runnable(fresh, request)
        if not options:
            return self._unscreened({}, request)
        chosen = self._most_diverse(self._least_tried_group(options, request), request)
        self._reject(request, [o for o in options if o is not chosen], "not in the seed design")
        return Choice(candidate=chosen.candidate, key=chosen.key, origin=Origin.SEED, prediction=chosen.prediction)

    def choose(self, children: Sequence[Candidate], request: Request) -> Choice:
        """The best of `children`, warm candidates and, where too few are new, random ones."""
        fresh = self._fresh(children, request)
        if self._predict is None or request.is_unscreened:
            return self._unscreened(fresh, request)
        warm_keys = {config.key for config in request.warm}
        fresh |= self._fresh(self._warm_candidates(request, warm_keys), request)
        options = self._runnable(fresh, request) or self._runnable(self._random(request), request)
        if not options:
            return self._unscreened({}, request)
        is_warm = [option.candidate.config.key in warm_keys for option in options]
        scorer = Scorer(self._problem, request.trials)
        scores = scorer.score([o.candidate for o in options], [o.prediction for o in options], is_warm)
        best = max(range(len(options)), key=lambda i: scores[i].rank_key)
        rest = [i for i in range(len(options)) if i != best]
        self._reject(request, [options[i] for i in rest], "outscored", [scores[i] for i in rest])
        chosen = options[best]
        origin = Origin.WARM if is_warm[best] else Origin.SCREENED
        return Choice(candidate=chosen.candidate, key=chosen.key, origin=origin, prediction=chosen.prediction)

    def _unscreened(self, fresh: dict[str, Candidate], request: Request) -> Choice:
        """The first new candidate, whatever the model says of it; any untried one where there is none."""
        pool = fresh or self._random(request)
        found = next(iter(pool.items()), None) or self._next_untried(request.tried)
        if found is None:
            raise SpaceExhausted("every candidate of the space has been tried or cannot run")
        key, candidate = found
        prediction = self.predict_one(candidate)
        return Choice(candidate=candidate, key=key, origin=Origin.UNSCREENED, prediction=prediction)

    def _random(self, request: Request) -> dict[str, Candidate]:
        rng = self.rng(request.number)
        return self._fresh([self._space.sample(rng) for _ in range(SEED_POOL)], request)

    def _warm_candidates(self, request: Request, warm_keys: AbstractSet[str]) -> list[Candidate]:
        """The deployments that are up, under every load of the space."""
        known = {
            trial.candidate.config.key: trial.candidate
            for trial in request.trials
            if trial.candidate is not None and trial.candidate.config in request.warm
        }
        return [other for key in warm_keys & set(known) for other in self._space.same_config(known[key])]

    def _fresh(self, candidates: Sequence[Candidate], request: Request) -> dict[str, Candidate]:
        """The distinct `candidates` by key that were not tried and that no rule forbids."""
        fresh: dict[str, Candidate] = {}
        for candidate in candidates:
            key = candidate.key
            if key in request.tried or key in fresh:
                continue
            reason = infeasibility(candidate, self._problem)
            if reason is None:
                fresh[key] = candidate
            else:
                self._log.add(self._rejected(request, candidate, key, f"infeasible: {reason}"))
        return fresh

    def _runnable(self, fresh: dict[str, Candidate], request: Request) -> list[_Option]:
        """Those of `fresh` that the model expects to run."""
        if not fresh or self._predict is None:
            return []
        predictions = self._predict(list(fresh.values()))
        require(len(predictions) == len(fresh), f"the model gave {len(predictions)} predictions for {len(fresh)}")
        options = []
        for (key, candidate), prediction in zip(fresh.items(), predictions, strict=True):
            if prediction.infeasible is None:
                options.append(_Option(candidate=candidate, key=key, prediction=prediction))
            else:
                self._log.add(self._rejected(request, candidate, key, f"predicted: {prediction.infeasible}"))
        return options

    def _least_tried_group(self, options: list[_Option], request: Request) -> list[_Option]:
        """The options of the engine and serving mode that was proposed least so far."""
        counts = Counter(_group(trial.candidate) for trial in request.trials if trial.candidate is not None)
        fewest = min(counts[_group(option.candidate)] for option in options)
        return [option for option in options if counts[_group(option.candidate)] == fewest]

    def _most_diverse(self, options: list[_Option], request: Request) -> _Option:
        """Of the better half by predicted rank, the one whose predicted point is farthest from those tried."""
        scorer = Scorer(self._problem, request.trials)
        feasibility = np.array([scorer.feasibility(option.prediction) for option in options])
        hopeful = [i for i in np.argsort(-feasibility) if feasibility[i] >= MINIMUM_FEASIBILITY]
        hopeful = hopeful or list(np.argsort(-feasibility)[:1])
        points = scorer.points([options[i].prediction for i in hopeful])
        maximise = [objective.direction is Direction.MAXIMIZE for objective in self._problem.objectives]
        ranks = moocore.pareto_rank(points, maximise=maximise)
        better = np.flatnonzero(ranks <= np.median(ranks))
        tried = [t.prediction for t in request.trials if t.prediction is not None and t.prediction.infeasible is None]
        farthest = _farthest(points[better], scorer.points(tried))
        return options[int(hopeful[int(better[farthest])])]

    def _reject(
        self, request: Request, options: list[_Option], reason: str, scores: Sequence[Score | None] | None = None
    ) -> None:
        for option, score in zip(options, scores or [None] * len(options), strict=True):
            rejected = self._rejected(request, option.candidate, option.key, reason)
            self._log.add(replace(rejected, metrics=option.prediction.metrics, score=score.rate if score else None))

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


def _group(candidate: Candidate) -> tuple[str, Mode]:
    return (candidate.config.engine, candidate.config.mode)


def _farthest(points: Points, others: Points) -> int:
    """Index of the point whose nearest neighbour among `others` is farthest, on normalised logarithmic axes."""
    if len(others) == 0:
        return 0
    logs, other_logs = np.log(np.maximum(points, 1e-12)), np.log(np.maximum(others, 1e-12))
    scale = np.maximum(np.ptp(np.vstack([logs, other_logs]), axis=0), 1e-12)
    distances = np.linalg.norm((logs[:, None, :] - other_logs[None, :, :]) / scale, axis=2)
    return int(distances.min(axis=1).argmax())
