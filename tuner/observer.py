"""What the search tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from search_spaces.problem import Problem
from studies.records import Proposal, TrialRecord

RECENT_TRIALS = 5


@dataclass(frozen=True, kw_only=True)
class Trying:
    """A trial that is being measured: what was proposed, its phase and the seconds since it began."""

    proposal: Proposal
    phase: str
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A study while it runs.

    `hypervolume` is against the worst values measured so far, so it compares only within the snapshot; `recent_gain` is
    its relative growth over the last `RECENT_TRIALS` trials, None while there are too few. `time_left_s` is None where
    the study has no limit of wall time.
    """

    name: str
    problem: Problem
    budget_trials: int
    trials: tuple[TrialRecord, ...]
    screened_out: int
    hypervolume: float
    time_left_s: float | None
    recent_gain: float | None = None
    trying: tuple[Trying, ...] = ()


class Observer(Protocol):
    """Watches a search. Its methods return quickly and never raise."""

    def note(self, text: str) -> None:
        """Something worth a line: a step of the set-up, a fault that was mended."""
        ...

    def begun(self, proposal: Proposal) -> None:
        """A trial was started."""
        ...

    def ended(self, record: TrialRecord, problem: Problem) -> None:
        """A trial of `problem` was measured, failed or was lost."""
        ...

    def now(self, snapshot: Snapshot) -> None:
        """The study as it stands; called several times a second."""
        ...
