"""Which study gets the next slice of the budget, and how much: a pure function of how the studies stand.

First every study gets one slice, the most important first, so that later ones learn from it. Then each slice goes where
the expected relative growth of the hypervolume, times the study's priority, is highest for what a trial takes of the
budget. A study that was closed gets the runs that confirm its front, for which the search leaves enough. The last of
the budget goes to studies whose dearest trial fits into it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from studies.spending import Spent
from tuner.campaigns.record import SliceKind
from tuner.campaigns.standing import Cost, Standing, mean_cost

CONFIRMING_SHARE = 1 / 3
"""Share of the budget that the search leaves for confirmations, at most."""
NO_COST = Cost(device_hours=0.0, dollars=0.0)
SLACK = 1.5
"""A slice may take this much more than its trials are expected to."""
OVER, NEAR = 0.005, 0.015
"""Shares of the budget: how far a campaign may end beyond it on purpose, and what may be left where no trial fits."""
DEARER = 1.5
"""A trial may take so many times what the dearest one of the last ones of its study took."""


@dataclass(frozen=True, kw_only=True)
class Purse:
    """What is left to spend; None where nothing limits it."""

    device_hours: float | None
    dollars: float | None

    def less(self, taken: Cost) -> Purse:
        """What is left after `taken`."""
        return Purse(
            device_hours=None if self.device_hours is None else self.device_hours - taken.device_hours,
            dollars=None if self.dollars is None else self.dollars - taken.dollars,
        )

    def part(self, parts: int) -> Purse:
        """One of so many equal parts."""
        return Purse(
            device_hours=None if self.device_hours is None else self.device_hours / parts,
            dollars=None if self.dollars is None else self.dollars / parts,
        )

    def affords(self, cost: Cost) -> bool:
        """True where `cost` may begin: half of it is there, so that ends fall short as often as they go over."""
        pairs = ((self.device_hours, cost.device_hours), (self.dollars, cost.dollars))
        return all(left is None or (left > 0 and left >= need / 2) for left, need in pairs)

    def holds(self, cost: Cost) -> bool:
        """True where the whole of `cost` is there."""
        pairs = ((self.device_hours, cost.device_hours), (self.dollars, cost.dollars))
        return all(left is None or (left > 0 and left >= need) for left, need in pairs)

    def with_share(self, share: float, total: Purse) -> Purse:
        """What is left and a `share` of the `total` more."""
        hours, dollars = share * (total.device_hours or 0.0), share * (total.dollars or 0.0)
        return self.less(Cost(device_hours=-hours, dollars=-dollars))

    def is_within(self, share: float, total: Purse) -> bool:
        """True where no more than a `share` of the `total` is left of a limit."""
        pairs = ((self.device_hours, total.device_hours), (self.dollars, total.dollars))
        return any(left is not None and left <= share * (whole or 0.0) for left, whole in pairs)

    def misses(self, costs: Sequence[Cost]) -> float:
        """How far from its end a trial ends that takes one of `costs`, each as likely: relative to what is left."""
        hours, dollars = [cost.device_hours for cost in costs], [cost.dollars for cost in costs]
        pairs = ((self.device_hours, hours), (self.dollars, dollars))
        return max((fmean(abs(1.0 - need / left) for need in needs) for left, needs in pairs if left), default=0.0)

    def share(self, cost: Cost) -> float:
        """What `cost` takes of it: the larger share where two things are limited, device-hours where nothing is."""
        pairs = ((self.device_hours, cost.device_hours), (self.dollars, cost.dollars))
        shares = [need / left for left, need in pairs if left is not None and left > 0]
        return max(shares, default=cost.device_hours)

    def least(self, other: Purse) -> Purse:
        """The smaller of both, limit by limit."""
        return Purse(
            device_hours=smaller(self.device_hours, other.device_hours), dollars=smaller(self.dollars, other.dollars)
        )


def smaller(one: float | None, other: float | None) -> float | None:
    """The smaller of two limits, of which None limits nothing."""
    known = [value for value in (one, other) if value is not None]
    return min(known) if known else None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The study that gets the next slice: `trials` more candidates, for at most `purse` more of the budget.

    In a check, `trial` is to have so many `runs`.
    """

    standing: Standing
    kind: SliceKind
    trials: int
    purse: Purse
    why: str
    worth: float | None = None
    trial: int | None = None
    runs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What is to be given out: what is `left` of the whole budget and `today`, in slices of `trials`, `first` at first.

    `total` is the whole budget, and what running slices may still take is out of `left` and `today` already.
    """

    total: Purse
    left: Purse
    today: Purse
    trials: int
    first: int | None = None

    @property
    def now(self) -> Purse:
        """What may be given out now."""
        return self.left.least(self.today)


def choose(
    standings: Sequence[Standing],
    priorities: dict[str, float],
    offer: Offer,
    *,
    resting: Collection[str] = (),
) -> Choice | None:
    """The next slice; None where no study can have one. Cells in `resting` run already, or wait after a failure."""
    free = [standing for standing in standings if standing.cell.name not in resting]
    guess = typical_cost(standings)
    closing = next((s for s in free if not s.is_open and s.lacking and offer.now.affords(s.cost or guess)), None)
    if closing is not None:
        return confirmation(closing, offer, guess)
    tail = Tail(left=offer.left.less(reserve(standings, offer.total, guess)), total=offer.total)
    purse = offer.now.least(tail.left)
    able = tail.fitting([s for s in free if s.is_open and purse.affords(s.cost or guess)], guess)
    if not able:
        return None
    waiting = [standing for standing in able if not standing.begun]
    if waiting:
        first = max(waiting, key=lambda s: priorities[s.cell.name])  # of equal ones the first of the matrix
        trials = tail.trials(_wanted(first, offer), first, guess)
        return _search(first, purse.part(len(waiting)), trials, guess, "it has not begun", None)
    worth = {s.cell.name: priorities[s.cell.name] * s.growth / max(purse.share(s.cost or guess), 1e-12) for s in able}
    best = max(able, key=lambda s: worth[s.cell.name])
    cost = best.cost or guess
    why = f"{best.growth:.2%} more hypervolume is expected of a trial that takes {cost.device_hours:.3g} device-hours"
    trials = tail.trials(_wanted(best, offer), best, guess)
    return _search(best, purse, trials, guess, why, worth[best.cell.name])


def _wanted(standing: Standing, offer: Offer) -> int:
    """Trials of a whole slice, as far as the study's own budget goes."""
    own = standing.cell.study.budget.trials - standing.progress.finished
    return max(1, min(own, offer.trials if standing.begun else offer.first or offer.trials))


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What is `left` for the search of the `total` budget: how its end is met."""

    left: Purse
    total: Purse

    @property
    def room(self) -> Purse:
        """What may be taken without ending too far beyond the budget."""
        return self.left.with_share(OVER, self.total)

    def fitting(self, able: Sequence[Standing], guess: Cost) -> list[Standing]:
        """Of `able` studies those of which every trial is expected to fit.

        Where there are none, the one that is expected to end nearest to the budget; nobody where its end is near
        enough already, or where not to begin is nearer.
        """
        found = [standing for standing in able if self.room.holds(dearest(standing, guess))]
        if found or not able or self.left.is_within(NEAR, self.total):
            return found
        nearest = min(able, key=lambda standing: self.left.misses(standing.costs or (guess,)))
        return [nearest] if self.left.misses(nearest.costs or (guess,)) < 1.0 else []

    def trials(self, wanted: int, standing: Standing, guess: Cost) -> int:
        """So many trials of a study, up to those `wanted`, that one more would fit if all were as dear as the dearest.

        At least one: the last ones are given out one by one, since what is left is known better then.
        """
        most = dearest(standing, guess)
        return next((n for n in range(wanted, 1, -1) if self.room.part(n + 1).holds(most)), 1)


def dearest(standing: Standing, guess: Cost) -> Cost:
    """The most that a trial of a study is expected to take, limit by limit."""
    costs = standing.costs or (guess,)
    return Cost(
        device_hours=DEARER * max(cost.device_hours for cost in costs),
        dollars=DEARER * max(cost.dollars for cost in costs),
    )


def _search(standing: Standing, purse: Purse, trials: int, guess: Cost, why: str, worth: float | None) -> Choice:
    return Choice(
        standing=standing,
        kind=SliceKind.SEARCH,
        trials=trials,
        purse=portion(purse, standing.cost or guess, trials if standing.cost else None),
        why=why,
        worth=worth,
    )


def portion(purse: Purse, cost: Cost, trials: int | None) -> Purse:
    """What a slice of `trials` at `cost` each may take of `purse`, all of it where that is None.

    The last trial of a slice begins below its limit and ends beyond it: half a trial is kept back.
    """
    return Purse(
        device_hours=_portion(purse.device_hours, cost.device_hours, trials),
        dollars=_portion(purse.dollars, cost.dollars, trials),
    )


def _portion(left: float | None, cost: float, trials: int | None) -> float | None:
    if left is None:
        return None
    wanted = SLACK * trials * cost if trials is not None and cost > 0 else math.inf
    return min(left - cost / 2, wanted)


def confirmation(standing: Standing, offer: Offer, guess: Cost) -> Choice:
    """The slice in which the front of `standing` is confirmed."""
    why = f"it is closed, and its front lacks {standing.lacking} runs"
    purse = portion(offer.now, standing.cost or guess, standing.lacking)
    return Choice(standing=standing, kind=SliceKind.CONFIRM, trials=0, purse=purse, why=why)


def typical_cost(standings: Sequence[Standing]) -> Cost:
    """Mean cost of a trial over the studies that have begun: what one of another study is taken to cost."""
    return mean_cost([standing.cost for standing in standings if standing.cost is not None]) or NO_COST


def reserve(standings: Sequence[Standing], total: Purse, guess: Cost) -> Cost:
    """What confirming every front as it is now would take, at most a third of the whole budget."""
    costs = [(standing.lacking, standing.cost or guess) for standing in standings]
    hours = sum(runs * cost.device_hours for runs, cost in costs)
    dollars = sum(runs * cost.dollars for runs, cost in costs)
    return Cost(
        device_hours=min(hours, CONFIRMING_SHARE * (total.device_hours or math.inf)),
        dollars=min(dollars, CONFIRMING_SHARE * (total.dollars or math.inf)),
    )


def purse_of(device_hours: float | None, dollars: float | None, spent: Spent) -> Purse:
    """What is left of a limit after `spent`."""
    limit = Purse(device_hours=device_hours, dollars=dollars)
    return limit.less(Cost(device_hours=spent.device_hours, dollars=spent.dollars))
