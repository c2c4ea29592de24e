"""Reading how a campaign stands from its storage: for the runner, and for whoever asks from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from search_spaces.problem import Problem
from studies.errors import StudyHalfMadeError, StudyNotFoundError
from studies.history import StudyHistory, study_names
from studies.records import TrialRecord
from studies.spending import Spent
from studies.storage import Storage
from tuner.campaigns.campaign import Campaign, Cell
from tuner.campaigns.policy import Purse, purse_of
from tuner.campaigns.record import CellRecord, Memory
from tuner.campaigns.schema import DAYS, WindowSection
from tuner.campaigns.standing import Standing, spent_on, standing_of, summed
from tuner.wiring import make_problem


@dataclass(frozen=True, kw_only=True)
class View:
    """A campaign at one moment: `now` is that moment, `today` what the trials that ended on its day have cost."""

    campaign: Campaign
    memory: Memory
    standings: tuple[Standing, ...]
    today: Spent
    now: datetime

    @property
    def spent(self) -> Spent:
        """What all trials of all studies have cost."""
        return summed([standing.total for standing in self.standings])

    @property
    def total(self) -> Purse:
        """The whole budget."""
        budget = self.campaign.rules.budget
        return Purse(device_hours=budget.device_hours, dollars=budget.cost)

    @property
    def left(self) -> Purse:
        """What is left of the whole budget."""
        budget = self.campaign.rules.budget
        return purse_of(budget.device_hours, budget.cost, self.spent)

    @property
    def left_today(self) -> Purse:
        """What is left of the day's."""
        day = self.campaign.rules.per_day
        return purse_of(day.device_hours, day.cost, self.today)

    @property
    def deadline(self) -> datetime | None:
        """When everything must be over."""
        text = self.campaign.rules.budget.deadline
        return None if text is None else datetime.fromisoformat(text)

    @property
    def is_late(self) -> bool:
        """True where the deadline has passed."""
        return self.deadline is not None and self.now >= self.deadline

    def standing(self, cell: str) -> Standing:
        """The standing of a cell."""
        return next(standing for standing in self.standings if standing.cell.name == cell)

    def trials_like(self, standing: Standing) -> tuple[TrialRecord, ...]:
        """Trials of all studies that share an engine and a node pool with `standing`'s."""
        own = standing.cell.study
        return tuple(
            trial
            for other in self.standings
            if other.cell.study.engines.keys() & own.engines.keys()
            and other.cell.study.node_pools.keys() & own.node_pools.keys()
            for trial in other.trials
        )

    def wall_s(self) -> float | None:
        """Seconds that a slice may last, until the deadline or the next pause; None where there is neither."""
        ends = [self.deadline] if self.deadline is not None else []
        begins = (next_begin(window, self.now) for window in self.campaign.rules.pauses)
        ends += [begin for begin in begins if begin is not None]
        return max(1.0, (min(ends) - self.now).total_seconds()) if ends else None

    def hold(self) -> str | None:
        """Why nothing may be begun now, None where it may."""
        if self.memory.pause is not None:
            return f"paused by {self.memory.pause.by}; go on with: tuner campaign resume {self.campaign.name}"
        ends = [end for window in self.campaign.rules.pauses if (end := window_end(window, self.now)) is not None]
        if ends:
            return f"in a pause of the week until {max(ends):%Y-%m-%d %H:%M %Z}"
        day = self.left_today
        if any(left is not None and left <= 0 for left in (day.device_hours, day.dollars)):
            zone = self.campaign.rules.per_day.zone
            return f"today's share of the budget is used; it goes on tomorrow (midnight in {zone})"
        return None


@dataclass
class Looker:
    """Reads a campaign's studies again and again; finished trials are decoded, and weighed, once."""

    storage: Storage
    campaign: Campaign
    _histories: dict[str, StudyHistory] = field(default_factory=dict)
    _problems: dict[str, Problem] = field(default_factory=dict)
    _standings: dict[str, Standing] = field(default_factory=dict)

    def view(self, memory: Memory, now: datetime) -> View:
        """The campaign as it is stored now."""
        records = {cell.name: CellRecord(cell=cell.name, study=cell.name) for cell in self.campaign.cells}
        records |= {name: record for name, record in memory.cells.items() if name in records}
        self._find([name for record in records.values() for name in (record.study, *record.earlier)])
        standings = tuple(self._standing(cell, records[cell.name]) for cell in self.campaign.cells)
        zone = self.campaign.rules.per_day.zone
        today = summed([spent_on(s.trials, s.problem, now, zone) for s in standings])
        return View(campaign=self.campaign, memory=memory, standings=standings, today=today, now=now)

    def _standing(self, cell: Cell, record: CellRecord) -> Standing:
        """How `cell` stands: as it stood where nothing of it has changed since."""
        history, last = self.history(record.study), self._standings.get(cell.name)
        trials = history.trials() if history else ()
        if last is None or last.record != record or not _are_same(last.trials, trials):
            earlier = [found for name in record.earlier if (found := self.history(name)) is not None]
            last = standing_of(cell, record, self._problem(cell), trials, earlier)
            self._standings[cell.name] = last
        return last

    def _problem(self, cell: Cell) -> Problem:
        if cell.name not in self._problems:
            self._problems[cell.name] = make_problem(cell.study)
        return self._problems[cell.name]

    def history(self, study: str) -> StudyHistory | None:
        """The stored study, None where it had not begun at the last look."""
        return self._histories.get(study)

    def _find(self, studies: Sequence[str]) -> None:
        """Look for those of `studies` that had not begun at the last look."""
        missing = [study for study in studies if study not in self._histories]
        there = study_names(self.storage) if missing else ()
        for study in missing:
            if study in there:
                with suppress(StudyNotFoundError, StudyHalfMadeError):  # its coordinator is about to make it
                    self._histories[study] = StudyHistory(self.storage, study)


def _are_same(before: Sequence[TrialRecord], now: Sequence[TrialRecord]) -> bool:
    """True for the very same records: what has ended is decoded once, and what runs anew at each reading."""
    return len(before) == len(now) and all(one is other for one, other in zip(before, now, strict=True))


def window_end(window: WindowSection, now: datetime) -> datetime | None:
    """When the pause ends in which `now` lies; None where it lies in none."""
    for begin, end in _spans(window, now):
        if begin <= now < end:
            return end
    return None


def next_begin(window: WindowSection, now: datetime) -> datetime | None:
    """When the pause begins next after `now`."""
    return min((begin for begin, _ in _spans(window, now) if begin > now), default=None)


def _spans(window: WindowSection, now: datetime) -> Sequence[tuple[datetime, datetime]]:
    """The pauses that begin from yesterday to a week ahead."""
    there = now.astimezone(ZoneInfo(window.zone))
    spans = []
    for day in range(-1, 8):
        date = (there + timedelta(days=day)).date()
        if DAYS[date.weekday()] in window.days:
            begin = datetime.fromisoformat(f"{date}T{window.begin}").replace(tzinfo=there.tzinfo)
            later = date + timedelta(days=1) if window.end <= window.begin else date
            end = datetime.fromisoformat(f"{later}T{window.end}").replace(tzinfo=there.tzinfo)
            spans.append((begin, end))
    return spans


def utc_now() -> datetime:
    """Now."""
    return datetime.now(UTC)
