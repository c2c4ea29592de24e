"""The probability that a configuration starts and holds under load, learnt from what failed and what did not.

Failures come in families: a mode that an engine cannot serve here, an option that it refuses, a size that does not fit.
So a candidate is a leaf of trees, one for each of its settings (an option's value, a parallel size, a node pool, the
load): engine, mode, value of the setting, configuration. Each link may be broken with a probability known beforehand,
and whatever stands below a broken link fails. With L(v) the likelihood of what became of the trials below link v,

    L(v) = q [none of them held] + (1 - q) * product of L(children)        P(v not broken | trials) = second term / L(v)

and a candidate holds where no link above it is broken: the product of these down its tree, exact within a tree. Of its
trees the most pessimistic one counts. The probability falls exponentially with the failures of a family that
never held, and one trial that holds clears every link above it.

What earlier studies tell of a link becomes its probability before the first trial: a suspicion, never more than
`MOST_SUSPECTED`, as what failed under other users may hold under these; and never less than for any link, so that what
held elsewhere may be found broken here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from search_spaces.outcome import FailureReason
from search_spaces.serving import Candidate
from studies.records import TrialRecord, TrialStatus

BROKEN = (0.02, 0.05, 0.05, 0.2)
"""Probability that an engine, a mode of it, a value of a setting in that mode, or a configuration is broken."""

CHANCE, CHANCE_UNDER_LOAD = 0.05, 0.3
"""Probability that a trial fails where nothing is broken: at its start, and under load (another load may hold)."""

MOST_SUSPECTED = 0.8
"""Probability up to which a link is taken for broken by what earlier studies tell."""

_UNDER_LOAD = frozenset(
    {
        FailureReason.OUT_OF_MEMORY_UNDER_LOAD,
        FailureReason.MEASUREMENT_TIMEOUT,
        FailureReason.REQUESTS_FAILED,
    }
)
_SIZES = ("tp", "pp", "dp", "ep")

_Path = tuple[str, ...]
"""The setting that names a tree, then the links from its root down."""

Suspicions = Mapping[_Path, float]
"""Probability that a link is broken, for links that are suspected more than usual."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What failures teach: `sound` is the log probability that a link is not broken, for links that saw trials.

    `suspected` are those of earlier studies, for links that saw none here.
    """

    sound: dict[_Path, float]
    any_failed: bool
    suspected: Suspicions = field(default_factory=dict)

    def probability(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """Probability (n,) that each candidate starts and holds; all alike while nothing has failed."""
        if not self.any_failed and not self.suspected:
            return np.full(len(candidates), 1.0 - CHANCE)
        return np.array([self._of(candidate) for candidate in candidates], dtype=np.float64)

    def _of(self, candidate: Candidate) -> float:
        return (1.0 - CHANCE) * math.exp(min(self._down(path) for path in _paths(candidate)))

    def _down(self, path: _Path) -> float:
        links = ((path[: depth + 2], broken) for depth, broken in enumerate(BROKEN))
        return sum(
            self.sound[link] if link in self.sound else math.log1p(-self.suspected.get(link, broken))
            for link, broken in links
        )


def holding_of(trials: Iterable[TrialRecord], suspected: Suspicions | None = None) -> Holding:
    """What the finished `trials` teach; faults of the infrastructure, whose trials are lost, teach nothing.

    `suspected` is what earlier studies tell, see `suspicions`.
    """
    told = [trial for trial in trials if trial.candidate is not None and trial.is_finished]
    any_failed = any(trial.status is TrialStatus.FAILED for trial in told)
    before = suspected or {}
    sound = _sound(told, before) if any_failed or before else {}
    return Holding(sound=sound, any_failed=any_failed, suspected=before)


def suspicions(trials: Iterable[TrialRecord]) -> Suspicions:
    """What the `trials` of earlier studies make one suspect in a new one, in whose terms their candidates are."""
    found = {path: min(MOST_SUSPECTED, -math.expm1(log)) for path, log in holding_of(trials).sound.items()}
    return {path: broken for path, broken in found.items() if broken > BROKEN[len(path) - 2]}


def _sound(trials: Sequence[TrialRecord], suspected: Suspicions) -> dict[_Path, float]:
    """Log probability that each link above `trials` is not broken, from the configurations up to the engines."""
    below: dict[_Path, float] = defaultdict(float)  # log of the product of the likelihoods below a link
    held: set[_Path] = set()
    for trial in trials:
        for path in _paths(trial.candidate) if trial.candidate else ():
            below[path] += math.log(_chance(trial))
            if trial.status is TrialStatus.MEASURED:
                held.update(path[:length] for length in range(2, len(path) + 1))
    sound: dict[_Path, float] = {}
    for usual in reversed(BROKEN):
        above: dict[_Path, float] = defaultdict(float)
        for path, product in below.items():
            broken = suspected.get(path, usual)
            unbroken = math.log1p(-broken) + product
            likelihood = unbroken if path in held else float(np.logaddexp(math.log(broken), unbroken))
            sound[path] = unbroken - likelihood
            above[path[:-1]] += likelihood
        below = above
    return sound


def _chance(trial: TrialRecord) -> float:
    """Probability of what became of `trial` where nothing is broken."""
    if trial.failure is None:
        return 1.0 - CHANCE
    return CHANCE_UNDER_LOAD if trial.failure.reason in _UNDER_LOAD else CHANCE


def _paths(candidate: Candidate) -> Iterator[_Path]:
    """The way down each tree: setting, engine, mode, value, configuration."""
    config, key = candidate.config, candidate.config.key
    for name, value in _settings(candidate):
        yield (name, config.engine, str(config.mode), value, key)


def _settings(candidate: Candidate) -> Iterator[tuple[str, str]]:
    yield "load", str(candidate.load)
    for pool in candidate.config.pools:
        yield f"{pool.role}.node_pool", pool.node_pool
        yield f"{pool.role}.replicas", str(pool.replicas)
        for name in _SIZES:
            yield f"{pool.role}.{name}", str(getattr(pool.parallelism, name))
        for name, value in pool.options:
            yield f"{pool.role}.{name}", str(value)
