"""How a running campaign is shown: a live view in a terminal, one line per event elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from search_spaces.problem import Problem
from studies.records import Proposal, TrialRecord
from tuner.campaigns.look import View
from tuner.observer import Observer, Snapshot
from tuner.progress import proposal_line, record_line

RECENT = 8
DRAWN_S = 0.5


@dataclass
class CampaignView:
    """Shows a campaign on `console`; see `tuner.campaigns.run.CampaignObserver`.

    `draw` makes the picture of a view; without it, and where there is no terminal, every event is a line.
    """

    console: Console
    draw: Callable[[View], RenderableType] | None = None
    note_line: Callable[[str], None] = lambda _: None
    _live: Live | None = None
    _began_s: float = field(default_factory=time.monotonic)
    _recent: list[str] = field(default_factory=list)
    _trying: dict[str, Snapshot] = field(default_factory=dict)
    _picture: RenderableType = ""
    _drawn_s: float = -math.inf

    def __enter__(self) -> Self:
        if self.draw is not None:
            self._live = Live(console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """A line, and a line of the campaign's log."""
        self.note_line(text)
        self.say(text)

    def say(self, text: str) -> None:
        """A line that the log of a study has already."""
        if self._live is None:
            self.console.print(Text(f"[{time.monotonic() - self._began_s:7.1f} s] {text}"), soft_wrap=True)
            return
        self._recent = [*self._recent[-RECENT + 1 :], text]
        self._redraw()

    def study(self, name: str) -> Observer:
        """Who watches the slices of a study."""
        return _StudyView(name=name, view=self)

    def now(self, view: View) -> None:
        """The campaign as it stands."""
        if self.draw is not None:
            self._picture = self.draw(view)
            self._redraw()

    def tries(self, name: str, snapshot: Snapshot | None) -> None:
        """What a study is trying now; None once its slice is over."""
        if self._live is None:
            return
        self._trying.pop(name, None)
        if snapshot is not None:
            self._trying[name] = snapshot
        if time.monotonic() - self._drawn_s >= DRAWN_S:
            self._redraw()

    def _redraw(self) -> None:
        self._drawn_s = time.monotonic()
        if self._live is None:
            return
        trying = [
            Text(f"{trial.phase} {trial.elapsed_s:.0f} s: {name}: {proposal_line(trial.proposal)}", style="cyan")
            for name, snapshot in self._trying.items()
            for trial in snapshot.trying
        ]
        self._live.update(Group(self._picture, *trying, *(Text(line, style="dim") for line in self._recent)))


@dataclass(frozen=True)
class _StudyView:
    """Passes on what a study tells, under its name; see `tuner.observer.Observer`."""

    name: str
    view: CampaignView

    def note(self, text: str) -> None:
        self.view.say(f"{self.name}: {text}")

    def begun(self, proposal: Proposal) -> None:
        self.view.say(f"{self.name}: {proposal_line(proposal)}")

    def ended(self, record: TrialRecord, problem: Problem) -> None:
        self.view.say(f"{self.name}: {record_line(record, problem)}")

    def now(self, snapshot: Snapshot) -> None:
        self.view.tries(self.name, snapshot)
