"""When a study ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from search_spaces.errors import require
from search_spaces.outcome import FailureReason
from studies.records import TrialRecord, TrialStatus
from studies.spending import NOTHING_SPENT, Spent


class StopReason(StrEnum):
    """Why a study ended."""

    TRIALS = "the budget of trials is used"
    WALL_TIME = "the budget of wall time is used"
    DEVICE_HOURS = "the budget of device-hours is used"
    COST = "the budget of money is used"
    LITTLE_GAIN = "little more is expected to be gained"
    SPACE_EXHAUSTED = "every candidate has been measured"
    INFRASTRUCTURE = "too many faults of the infrastructure in a row"

    @property
    def is_final(self) -> bool:
        """True where a resume as it stands would find nothing to do."""
        return self not in {StopReason.WALL_TIME, StopReason.INFRASTRUCTURE}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a study: finished candidates over its whole life, wall time of this run, lost trials in a row.

    `min_gain` ends the study when each of the last `patience` screened proposals came with a smaller expected growth of
    the hypervolume, relative to what was held; None for no such limit. `device_hours` and `dollars` limit what all
    trials cost (see `studies.spending`), those in flight taken for average ones.
    """

    trials: int
    wall_s: float | None = None
    device_hours: float | None = None
    dollars: float | None = None
    min_gain: float | None = None
    patience: int = 4
    lost_in_a_row: int = 10

    def __post_init__(self) -> None:
        require(self.trials >= 1, f"budget trials={self.trials} must be at least 1")
        require(self.wall_s is None or self.wall_s > 0, f"budget wall_s={self.wall_s} must be above 0")
        for label in ("device_hours", "dollars"):
            value = getattr(self, label)
            require(value is None or value > 0, f"budget {label}={value} must be above 0")
        require(self.min_gain is None or self.min_gain > 0, f"budget min_gain={self.min_gain} must be above 0")
        require(self.patience >= 1, f"budget patience={self.patience} must be at least 1")
        require(self.lost_in_a_row >= 1, f"lost_in_a_row={self.lost_in_a_row} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a study is.

    `finished` and `running` count candidates; repeats on purpose count apart, in `repeats` once they are finished.
    `lost_in_a_row` counts the lost trials since the last finished one, by number. `expected_gains` are those that the
    screen stated, of finished trials by number (see `studies.records.Plan`).
    """

    finished: int
    running: int
    waiting: int
    lost: int
    lost_in_a_row: int
    expected_gains: tuple[float, ...] = ()
    repeats: int = 0

    def little_gain(self, least: float, patience: int) -> bool:
        """True where each of the last `patience` expected gains is below `least`, and there are so many."""
        last = self.expected_gains[-patience:]
        return len(last) == patience and all(gain < least for gain in last)


def progress_of(trials: Sequence[TrialRecord], lease: str | None = None) -> Progress:
    """Counts over all trials of a study; of those lost in a row, the ones measured under `lease` where it is given.

    A run that follows one which ended for too many faults must not end for the same ones.
    """
    in_a_row = 0
    for trial in trials:
        if trial.is_finished:
            in_a_row = 0
        elif trial.status is TrialStatus.LOST and lease in (None, trial.lease) and not _lost_its_coordinator(trial):
            in_a_row += 1
    return Progress(
        finished=sum(trial.is_finished and not trial.is_repeat for trial in trials),
        running=sum(trial.status is TrialStatus.RUNNING and not trial.is_repeat for trial in trials),
        waiting=sum(trial.status is TrialStatus.WAITING for trial in trials),
        lost=sum(trial.status is TrialStatus.LOST for trial in trials),
        lost_in_a_row=in_a_row,
        expected_gains=tuple(t.expected_gain for t in trials if t.is_finished and t.expected_gain is not None),
        repeats=sum(trial.is_finished and trial.is_repeat for trial in trials),
    )


def stop_reason(
    budget: Budget,
    progress: Progress,
    *,
    elapsed_s: float,
    space_exhausted: bool = False,
    spent: Spent = NOTHING_SPENT,
) -> StopReason | None:
    """Why no further trial may be asked for, None where one may.

    Running trials count towards the budget of trials, so that it is met exactly; a stop for that reason means: wait for
    those, and ask again if one of them is lost.
    """
    little_gain = budget.min_gain is not None and progress.little_gain(budget.min_gain, budget.patience)
    reasons = (
        (StopReason.TRIALS, progress.finished + progress.running >= budget.trials),
        (StopReason.WALL_TIME, budget.wall_s is not None and elapsed_s >= budget.wall_s),
        *((limit, True) for limit in over_budget(budget, spent.with_running(progress.running))),
        (StopReason.LITTLE_GAIN, little_gain),
        (StopReason.INFRASTRUCTURE, progress.lost_in_a_row >= budget.lost_in_a_row),
        (StopReason.SPACE_EXHAUSTED, space_exhausted and progress.waiting == 0),
    )
    return next((reason for reason, holds in reasons if holds), None)


def over_budget(budget: Budget, spent: Spent) -> tuple[StopReason, ...]:
    """Which limits `spent` has reached."""
    limits = (
        (StopReason.DEVICE_HOURS, budget.device_hours, spent.device_hours),
        (StopReason.COST, budget.dollars, spent.dollars),
    )
    return tuple(reason for reason, limit, used in limits if limit is not None and used >= limit)


def _lost_its_coordinator(trial: TrialRecord) -> bool:
    return trial.failure is None or trial.failure.reason is FailureReason.LOST_COORDINATOR
