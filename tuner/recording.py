"""An observer that writes the story of a run to the study's log too, where every machine with the storage reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search_spaces.problem import Problem
from studies.records import Proposal, TrialRecord
from tuner.observer import Observer, Snapshot
from tuner.progress import proposal_line, record_line


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Passes everything on to `observer`, and a line for each event to `note_line`; see `tuner.observer.Observer`."""

    observer: Observer
    note_line: Callable[[str], None]

    def note(self, text: str) -> None:
        """A line of its own."""
        self.note_line(text)
        self.observer.note(text)

    def begun(self, proposal: Proposal) -> None:
        """What is tried."""
        self.note_line(proposal_line(proposal))
        self.observer.begun(proposal)

    def ended(self, record: TrialRecord, problem: Problem) -> None:
        """What came of it."""
        self.note_line(record_line(record, problem))
        self.observer.ended(record, problem)

    def now(self, snapshot: Snapshot) -> None:
        """Not for the log."""
        self.observer.now(snapshot)
