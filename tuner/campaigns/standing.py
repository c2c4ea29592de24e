"""How the studies of a campaign stand: what each has found, what it has cost, and what more of it is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

from scipy.special import ndtr

from search_spaces.metrics import Direction, metric_info
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.slos import Slo, hard_slos
from studies.history import StudyHistory
from studies.pareto import front, hypervolume_history
from studies.records import TrialRecord, TrialStatus
from studies.repeats import RepeatRule, lacking_runs
from studies.spending import Spent, spent
from studies.stopping import Progress, progress_of
from studies.worth import UNKNOWN_LOG_STDDEV
from tuner.campaigns.campaign import Cell
from tuner.campaigns.record import CellRecord

LAST = 4
"""Trials that tell what the next one is worth."""
COSTS_OF = 8
"""Trials that tell what the next one costs."""
PACE = 0.15
"""Share of what a study still lacks that a trial adds: what the twelve studies of benchmarks/campaign.py showed."""
FIRST_GROWTH = PACE
"""Expected growth by the first candidate that meets the SLOs."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Device-hours and dollars of a trial."""

    device_hours: float
    dollars: float


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A cell's study as it is stored.

    `trials` are those of the current generation, `total` is what all generations have cost. `lacking` are the runs that
    its front still wants. `growth` is the expected relative growth of its hypervolume by one more candidate, and
    `costs` are what its last trials have taken, none before the first has ended.
    """

    cell: Cell
    record: CellRecord
    problem: Problem
    directions: tuple[Direction, ...]
    trials: tuple[TrialRecord, ...]
    progress: Progress
    spent: Spent
    total: Spent
    lacking: int
    growth: float
    costs: tuple[Cost, ...]

    @property
    def cost(self) -> Cost | None:
        """What a trial is expected to take: the mean of the last ones; None before the first has ended."""
        return mean_cost(self.costs)

    @property
    def begun(self) -> bool:
        """True where a trial of it has been finished."""
        return self.progress.finished > 0

    @property
    def measured(self) -> int:
        """Candidates that were measured."""
        return sum(trial.status is TrialStatus.MEASURED and not trial.is_repeat for trial in self.trials)

    def is_hopeless(self, least: float, patience: int) -> bool:
        """True where nothing met the SLOs yet, and each of the last candidates had a chance below `least` to do so."""
        tried = [t for t in self.trials if t.is_finished and not t.is_repeat and t.prediction is not None]
        if len(tried) < max(patience, LAST) or self.front:
            return False
        chances = [chance_of(t.prediction, self.problem.slos) for t in tried[-patience:] if t.prediction is not None]
        return all(chance < least for chance in chances)

    @property
    def is_open(self) -> bool:
        """True where it may still get new candidates."""
        return self.record.closed is None

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """Its Pareto front."""
        return front(self.trials, self.directions)

    @property
    def best(self) -> TrialRecord | None:
        """The member of the front that is best in the first objective; None where there is none."""
        return next(iter(self.front), None)


def standing_of(
    cell: Cell,
    record: CellRecord,
    problem: Problem,
    trials: tuple[TrialRecord, ...],
    earlier: Sequence[StudyHistory],
) -> Standing:
    """The standing of `cell`, whose study has `trials`; `earlier` are its former generations."""
    directions = tuple(objective.direction for objective in problem.objectives)
    progress = progress_of(trials)
    now = spent(trials, problem)
    rule = RepeatRule(control_every=cell.study.budget.control_every, confirm=cell.study.budget.confirm)
    lacking = lacking_runs(trials, front(trials, directions), rule)
    return Standing(
        cell=cell,
        record=record,
        problem=problem,
        directions=directions,
        trials=trials,
        progress=progress,
        spent=now,
        total=summed([now, *(spent(each.trials(), problem) for each in earlier)]),
        lacking=sum(lacking.values()),
        growth=expected_growth(trials, directions, progress, problem.slos),
        costs=last_costs(trials, problem),
    )


def summed(parts: Sequence[Spent]) -> Spent:
    """Several costs as one."""
    return Spent(
        device_hours=sum(part.device_hours for part in parts),
        dollars=sum(part.dollars for part in parts),
        trials=sum(part.trials for part in parts),
    )


def expected_growth(
    trials: Sequence[TrialRecord], directions: Sequence[Direction], progress: Progress, slos: Sequence[Slo] = ()
) -> float:
    """What the next candidate is expected to add to the hypervolume, as a share of what the study will hold in the end.

    The screen says how much its candidates are expected to add to what is held (mean of the last `LAST`); where it
    says nothing, what they brought counts. A search that adds a share `PACE` of what it still lacks with each trial
    and grows by g, relative to what it holds, holds PACE / (PACE + g) of its end: it adds PACE g / (PACE + g) of that.
    """
    volumes = [point.hypervolume for point in hypervolume_history(trials, directions)]
    if not volumes or volumes[-1] <= 0:
        return first_growth(trials, slos)
    gains = progress.expected_gains[-LAST:]
    steps = min(LAST, len(volumes) - 1)
    if gains:
        growth = statistics.fmean(gain / (1.0 + gain) for gain in gains)
    elif steps:
        growth = max(0.0, (volumes[-1] - volumes[-1 - steps]) / volumes[-1] / steps)
    else:
        growth = 1.0
    return PACE * growth / (PACE + growth)


def first_growth(trials: Sequence[TrialRecord], slos: Sequence[Slo]) -> float:
    """Expected growth by the next candidate of a study that holds nothing: the chance that it meets every SLO.

    What the model gave the last `LAST` candidates, but no more than 1 of n + 1 after n that did not meet them.
    """
    tried = [t for t in trials if t.is_finished and not t.is_repeat and t.prediction is not None]
    if not tried:
        return FIRST_GROWTH
    chances = [chance_of(t.prediction, slos) for t in tried[-LAST:] if t.prediction is not None]
    return FIRST_GROWTH * min(statistics.fmean(chances), 1.0 / (len(tried) + 1))


def chance_of(prediction: Prediction, slos: Sequence[Slo]) -> float:
    """The probability that a candidate of which this is predicted meets every hard SLO, taken as independent."""
    chance = 1.0 if prediction.infeasible is None else 0.0
    for slo in hard_slos(slos):
        value, limit = prediction.metrics.get(slo.metric), slo.limit
        if value is not None and limit is not None and value > 0 and limit > 0:
            spread = max(prediction.log_stddev.get(slo.metric, UNKNOWN_LOG_STDDEV), 1e-6)
            room = math.log(limit / value) / spread
            lower = metric_info(slo.metric).direction is Direction.MINIMIZE
            chance *= float(ndtr(room if lower else -room))
    return chance


def last_costs(trials: Sequence[TrialRecord], problem: Problem) -> tuple[Cost, ...]:
    """What the last `COSTS_OF` trials that have an outcome have taken."""
    ended = [trial for trial in trials if trial.outcome is not None and trial.candidate is not None]
    each = (spent([trial], problem) for trial in ended[-COSTS_OF:])
    return tuple(Cost(device_hours=one.device_hours, dollars=one.dollars) for one in each)


def mean_cost(costs: Sequence[Cost]) -> Cost | None:
    """The mean of `costs`; None where there are none."""
    if not costs:
        return None
    return Cost(
        device_hours=statistics.fmean(cost.device_hours for cost in costs),
        dollars=statistics.fmean(cost.dollars for cost in costs),
    )


def spent_on(trials: Sequence[TrialRecord], problem: Problem, day: datetime, zone: str) -> Spent:
    """What the trials that ended on the date of `day`, in `zone`, have cost."""
    there = ZoneInfo(zone)
    date = day.astimezone(there).date()
    today = [t for t in trials if t.ended_at is not None and t.ended_at.astimezone(there).date() == date]
    return spent(today, problem)


def failures(standings: Sequence[Standing]) -> Mapping[str, int]:
    """Failures of all studies by class, the most frequent first."""
    counts: dict[str, int] = {}
    for trial in (trial for standing in standings for trial in standing.trials if trial.failure is not None):
        if trial.failure is not None:
            counts[trial.failure.reason.value] = counts.get(trial.failure.reason.value, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
