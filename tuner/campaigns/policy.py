"""Which study gets the next slice of the budget, and how much: a pure function of how the studies stand.

First every study gets one slice, the most important first, so that later ones learn from it. Then each slice goes where
the expected relative growth of the hypervolume, times the study's priority, is highest for what a trial takes of the
budget. A study that was closed gets the runs that confirm its front, for which the search leaves enough.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from studies.spending import Spent
from tuner.campaigns.record import SliceKind
from tuner.campaigns.standing import Cost, Standing

CONFIRMING_SHARE = 1 / 3
"""Share of the budget that the search leaves for confirmations, at most."""
NO_COST = Cost(device_hours=0.0, dollars=0.0)
SLACK = 1.5
"""A slice may take this much more than its trials are expected to."""


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
    purse = offer.now.least(offer.left.less(reserve(standings, offer.total, guess)))
    able = [s for s in free if s.is_open and purse.affords(s.cost or guess)]
    able = [s for s in able if purse.holds(s.cost or guess)] or able  # the last of it goes where it is enough
    if not able:
        return None
    waiting = [standing for standing in able if not standing.begun]
    if waiting:
        first = max(waiting, key=lambda s: priorities[s.cell.name])  # of equal ones the first of the matrix
        return _search(first, purse.part(len(waiting)), offer, guess, "it has not begun", None)
    worth = {s.cell.name: priorities[s.cell.name] * s.growth / max(purse.share(s.cost or guess), 1e-12) for s in able}
    best = max(able, key=lambda s: worth[s.cell.name])
    cost = best.cost or guess
    why = f"{best.growth:.2%} more hypervolume is expected of a trial that takes {cost.device_hours:.3g} device-hours"
    return _search(best, purse, offer, guess, why, worth[best.cell.name])


def _search(standing: Standing, purse: Purse, offer: Offer, guess: Cost, why: str, worth: float | None) -> Choice:
    own = standing.cell.study.budget.trials - standing.progress.finished
    wanted = offer.trials if standing.begun else offer.first or offer.trials
    trials = max(1, min(wanted, own))
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
    known = [standing.cost for standing in standings if standing.cost is not None]
    if not known:
        return NO_COST
    return Cost(
        device_hours=statistics.fmean(cost.device_hours for cost in known),
        dollars=statistics.fmean(cost.dollars for cost in known),
    )


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
