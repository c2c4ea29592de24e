"""Running a campaign: give out the budget in slices until nothing is left of it, or nothing is left to gain.

Whatever is decided is stored before it is done, and decided from what is stored: a runner that was killed is followed
by another one, which first lets the slices end that were under way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

from studies.errors import StudyBusyError
from studies.lease import Lease, is_free, read_events, read_lease, take_lease
from studies.stopping import StopReason
from studies.storage import Storage
from tuner.campaigns.campaign import Campaign
from tuner.campaigns.look import Looker, View, utc_now
from tuner.campaigns.policy import NO_COST, Choice, Offer, choose, portion, smaller
from tuner.campaigns.record import CellRecord, End, Record, Slice, SliceEnd, SliceKind, Suspect, closed
from tuner.campaigns.slices import Order, SliceRunner
from tuner.campaigns.standing import Cost, Standing
from tuner.campaigns.watch import due, odd_nodes, verdict
from tuner.deploy.archives import attach_deployments
from tuner.observer import Observer
from tuner.places import Place
from tuner.report_dashboard import publish
from tuner.session import ENDED_BY, Again, lease_times
from tuner.stored import make_report
from tuner.study_schema import BudgetSection, StudyFile

ORDERS_S = 1.0
"""How often orders of others are looked for."""
BUDGET_USED = "the budget is used"
NOTHING_LEFT = "nothing is left to gain: every study is closed"
HOPELESS = "nothing is expected to meet its SLOs"
DEADLINE = "the deadline has passed"
MOST_CHECKED = 50


class CampaignObserver(Protocol):
    """Watches a campaign; its methods return quickly and never raise."""

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def study(self, name: str) -> Observer:
        """Who watches the slices of a study."""
        ...

    def now(self, view: View) -> None:
        """The campaign as it stands, after each slice."""
        ...


class Listener(Protocol):
    """Is told of everything that a webhook may want to know."""

    def turned(self, view: View) -> None:
        """The campaign as it stands; called about once a second."""
        ...

    def drifted(self, view: View, key: str, text: str, standing: Standing) -> None:
        """Something is not what it was; `key` is the same for the same thing."""
        ...

    def ended(self, view: View, slice_: Slice) -> None:
        """A slice has ended."""
        ...

    def over(self, view: View, reason: str) -> None:
        """The campaign is over."""
        ...


@dataclass
class CampaignRun:
    """One runner of a campaign, under its lease. `stop_requested` says whether a signal asked to stop."""

    campaign: Campaign
    record: Record
    storage: Storage
    place: Place
    lease: Lease
    slices: SliceRunner
    observer: CampaignObserver
    stop_requested: Callable[[], bool]
    listeners: Sequence[Listener] = ()
    clock: Callable[[], datetime] = utc_now
    sleep: Callable[[float], None] = time.sleep
    retry_s: float = 300.0
    _looker: Looker = field(init=False)
    _running: dict[str, Slice] = field(default_factory=dict)
    _orphans: dict[str, Slice] = field(default_factory=dict)
    _held: str | None = None
    _asked_s: float = -math.inf
    _paused: bool = False

    def __post_init__(self) -> None:
        self._looker = Looker(storage=self.storage, campaign=self.campaign)

    def run(self) -> str | None:
        """Go on until the campaign is over, and return why; None where a stop was ordered."""
        self._adopt()
        try:
            while not self.is_stopping():
                view = self._collect()
                for listener in self.listeners:
                    listener.turned(view)
                reason = self._turn(view)
                if reason is not None:
                    self._end(view, reason)
                    return reason
            return None
        finally:
            self.slices.close()
            self._collect()

    def is_stopping(self) -> bool:
        """True where a signal or an order asks this runner to end."""
        self.lease.ensure()
        return self.stop_requested() or self.lease.stop_order is not None

    def is_halted(self) -> bool:
        """True where slices that run shall end now: stopped, or paused."""
        return self.is_stopping() or self.is_paused()

    def is_paused(self) -> bool:
        """True where someone ordered a pause, as of a second ago."""
        if time.monotonic() - self._asked_s >= ORDERS_S:
            self._asked_s = time.monotonic()
            self._paused = self.record.pause() is not None
        return self._paused

    def _adopt(self) -> None:
        """Take up the slices that had not ended when the runner before did."""
        for found in self.record.memory().slices:
            if found.end is None:
                self._orphans[found.study] = found
                self.observer.note(f"slice {found.number} of {found.study} was not finished; it goes on")

    # ------------------------------------------------------------------------------------------------ one turn

    def _turn(self, view: View) -> str | None:
        """Begin what may begin, and wait a little; returns why the campaign is over once it is."""
        if view.memory.pause is not None:
            self.slices.stop()  # a pause of the week lets slices end, an order does not wait
        self._say_hold(view.hold())
        if view.hold() is None and not view.is_late:
            self._resume_orphans(view)
            if self._begin(view):
                return None
        if not self._running and not self._orphans:
            reason = self._over(view)
            if reason is not None:
                return reason
        self.sleep(ORDERS_S)
        return None

    def _say_hold(self, hold: str | None) -> None:
        if hold != self._held:
            self._held = hold
            self.observer.note("it goes on" if hold is None else f"nothing is begun: {hold}")

    def _over(self, view: View) -> str | None:
        """Why the campaign is over, with nothing running and nothing begun; None where it only waits."""
        if view.is_late:
            return DEADLINE
        if view.hold() is not None or self._resting(view):
            return None
        if all(not standing.is_open for standing in view.standings):
            if self.campaign.rules.watch.every is not None and not self._closed_by_budget(view):
                return None  # it goes on looking until its deadline
            return BUDGET_USED if self._closed_by_budget(view) else NOTHING_LEFT
        now = view.now.timestamp()
        for standing in view.standings:  # what the budget holds no more closes every study; their fronts are confirmed
            if standing.is_open:
                self.record.note_cell(closed(standing.record, BUDGET_USED, now))
                self._publish(standing)
        return None

    def _closed_by_budget(self, view: View) -> bool:
        return any(standing.record.closed == BUDGET_USED for standing in view.standings)

    def _end(self, view: View, reason: str) -> None:
        self.record.note_end(End(at_s=self.clock().timestamp(), reason=reason))
        self.observer.note(f"the campaign is over: {reason}")
        for listener in self.listeners:
            listener.over(view, reason)

    # ------------------------------------------------------------------------------------------------ beginning

    def _begin(self, view: View) -> bool:
        """Give out one slice; True where one was."""
        if len(self._running) + len(self._orphans) >= self.slices.at_once:
            return False
        day, left = view.left_today, view.left
        for standing in view.standings:  # what runs may still take is given out already
            promised = self._promised(standing)
            day, left = day.less(promised), left.less(promised)
        rules = self.campaign.rules
        slices = rules.slices
        offer = Offer(total=view.total, left=left, today=day, trials=slices.trials, first=slices.first)
        resting = {*self._busy(view), *self._resting(view), *self._given_up(view)}
        priorities = {cell.name: self.campaign.priority(cell) for cell in self.campaign.cells}
        choice = self._check(view, offer, resting) or choose(view.standings, priorities, offer, resting=resting)
        if choice is None:
            return False
        self._start(self._slice(choice, view), view)
        return True

    def _check(self, view: View, offer: Offer, resting: Collection[str]) -> Choice | None:
        """The best configuration of a study once more, where the ground has moved under it."""
        watch = self.campaign.rules.watch
        for standing in view.standings:
            cost = standing.cost
            if standing.cell.name in resting or cost is None or not offer.now.affords(cost):
                continue
            found = due(
                standing,
                view.trials_like(standing) if watch.environment else (),
                every_s=watch.every,
                now_s=view.now.timestamp(),
            )
            if found is not None and found.why not in standing.record.checked:
                why = f"its best configuration is measured again: {found.why}"
                return Choice(
                    standing=standing,
                    kind=SliceKind.CHECK,
                    trials=0,
                    purse=portion(offer.now, cost, 1),
                    why=why,
                    trial=found.trial,
                    runs=found.runs,
                )
        return None

    def _promised(self, standing: Standing) -> Cost:
        """What the slice that runs in a cell may still take: half a trial beyond its limit (see `policy.portion`)."""
        running = self._running.get(standing.record.study) or self._orphans.get(standing.record.study)
        if running is None:
            return NO_COST
        hours, dollars, trial = running.device_hours or 0.0, running.dollars or 0.0, standing.cost or NO_COST
        return Cost(
            device_hours=max(0.0, hours - standing.spent.device_hours) + trial.device_hours / 2,
            dollars=max(0.0, dollars - standing.spent.dollars) + trial.dollars / 2,
        )

    def _busy(self, view: View) -> set[str]:
        """Cells that run, and those that share a node pool with one that does (unless told how many run at once)."""
        running = {found.cell for found in (*self._running.values(), *self._orphans.values())}
        if self.campaign.rules.slices.side_by_side != "auto":
            return running
        pools = {pool for name in running for pool in self.campaign.cell(name).study.node_pools}
        return running | {s.cell.name for s in view.standings if pools & s.cell.study.node_pools.keys()}

    def _resting(self, view: View) -> set[str]:
        """Cells whose last slices failed, and that are tried again later: twice as late after each."""
        resting = set()
        for standing in view.standings:
            failed = failed_in_a_row(view.memory.slices_of(standing.cell.name))
            last = failed[-1].end if failed and not self._is_given_up(failed) else None
            if last is not None and (standing.is_open or standing.lacking):
                wait_s = self.retry_s * 2 ** (len(failed) - 1)
                if view.now.timestamp() < last.at_s + wait_s:
                    resting.add(standing.cell.name)
        return resting

    def _given_up(self, view: View) -> set[str]:
        names = [standing.cell.name for standing in view.standings]
        return {name for name in names if self._is_given_up(failed_in_a_row(view.memory.slices_of(name)))}

    def _slice(self, choice: Choice, view: View) -> Slice:
        standing = choice.standing
        return Slice(
            number=len(view.memory.slices) + 1,
            cell=standing.cell.name,
            study=standing.record.study,
            kind=choice.kind,
            begun_s=view.now.timestamp(),
            why=choice.why,
            worth=choice.worth,
            trials=max(1, standing.progress.finished + choice.trials),
            device_hours=_above(standing.spent.device_hours, choice.purse.device_hours),
            dollars=_above(standing.spent.dollars, choice.purse.dollars),
            before_hours=standing.spent.device_hours,
            before_dollars=standing.spent.dollars,
            before_measured=standing.measured,
            trial=choice.trial,
            runs=choice.runs,
        )

    def _start(self, slice_: Slice, view: View) -> None:
        """Write a slice down, then let it run."""
        if slice_.cell not in view.memory.cells:
            self.record.note_cell(CellRecord(cell=slice_.cell, study=slice_.study))
        self.record.note_slice(slice_)
        self.observer.note(f"slice {slice_.number}, {slice_.kind} in {slice_.study}: {slice_.why}")
        self._go(slice_, view)

    def _go(self, slice_: Slice, view: View) -> None:
        cell = self.campaign.cell(slice_.cell)
        study = cell.study.model_copy(update={"name": slice_.study})
        avoid = tuple(s.host for s in view.memory.quarantine if s.pool in study.node_pools)
        self._running[slice_.study] = slice_
        again = None
        if slice_.trial is not None and slice_.runs is not None:
            again = Again(trial=slice_.trial, runs=slice_.runs)
        limits = portion_of(slice_, study, view.wall_s(), self.campaign)
        order = Order(study=study, portion=limits, again=again, avoid=avoid)
        self.slices.start(order, self.observer.study(slice_.study))

    def _resume_orphans(self, view: View) -> None:
        """Go on with slices of a runner before, unless a process of that one still carries them out."""
        for study, slice_ in tuple(self._orphans.items()):
            if len(self._running) < self.slices.at_once and is_free(read_lease(self.storage, study)):
                del self._orphans[study]
                self._go(slice_, view)

    # ------------------------------------------------------------------------------------------------ ending

    def _collect(self) -> View:
        """Write down what has ended, and look at everything anew."""
        ended = self.slices.ended()
        view = self._looker.view(self.record.memory(), self.clock())
        if not ended:
            return view
        stopping = self.stop_requested() or self.lease.stop_order is not None or view.memory.pause is not None
        for study, trouble in ended.items():
            slice_ = self._running.pop(study)
            reason = trouble or self._reason_of(study)
            if stopping and (trouble is None and reason not in set(StopReason)):
                self._orphans[study] = slice_  # it was interrupted: it goes on after the stop or the pause
                continue
            self._finish(slice_, view, reason, failed=trouble is not None)
        view = self._looker.view(self.record.memory(), self.clock())
        self.observer.now(view)
        return view

    def _finish(self, slice_: Slice, view: View, reason: str, *, failed: bool) -> None:
        standing = view.standing(slice_.cell)
        measured = standing.measured - slice_.before_measured
        done = replace(
            slice_,
            end=SliceEnd(
                at_s=self.clock().timestamp(),
                reason=reason,
                measured=measured,
                device_hours=standing.spent.device_hours - slice_.before_hours,
                dollars=standing.spent.dollars - slice_.before_dollars,
                failed=failed or reason == StopReason.INFRASTRUCTURE,
            ),
        )
        self.record.note_slice(done)
        self.observer.note(f"slice {done.number} of {done.study} ended: {reason}; {measured} candidates measured")
        why = self._why_closed(standing, done)
        if why is not None and standing.is_open:
            self.record.note_cell(closed(standing.record, why, self.clock().timestamp()))
            self.observer.note(f"{standing.record.study} is closed: {why}")
        if why is not None or done.kind is not SliceKind.SEARCH:
            self._publish(standing)
        after = self._looker.view(self.record.memory(), self.clock())
        for listener in self.listeners:
            listener.ended(after, done)
        if done.kind is SliceKind.CHECK and not failed:
            self._judge(after, done)
        if self.campaign.rules.watch.quarantine:
            self._quarantine(after, after.standing(done.cell))

    def _judge(self, view: View, check: Slice) -> None:
        """Compare what was measured again with what was before; a new study where it moved beyond the noise."""
        standing = view.standing(check.cell)
        moved = verdict(standing, check.trial or 0) if check.end and standing.progress.repeats else ()
        clear = [str(each) for each in moved if each.is_clear]
        why = check.why.partition(": ")[2]
        told = "; ".join(map(str, moved)) or "the second measurement failed"
        text = f"{check.study} was measured again ({why}): {told}"
        record = replace(standing.record, checked=(*standing.record.checked, why)[-MOST_CHECKED:])
        if clear:
            number = record.generation + 1
            record = CellRecord(
                cell=record.cell,
                study=f"{record.cell}.g{number}",
                generation=number,
                earlier=(*record.earlier, record.study),
            )
            text += f". A new study begins: {record.study}"
        self.record.note_cell(record)
        self.observer.note(text)
        if clear:
            for listener in self.listeners:
                listener.drifted(view, f"moved:{check.number}", text, standing)

    def _quarantine(self, view: View, standing: Standing) -> None:
        """Avoid nodes whose controls differ from the others'; those whose time is over are tried again."""
        now_s, limit_s = view.now.timestamp(), self.campaign.rules.watch.quarantine_for
        kept = tuple(found for found in view.memory.quarantine if now_s - found.since_s < limit_s)
        known = {(found.pool, found.host) for found in kept}
        fresh = [
            Suspect(host=odd.host, pool=odd.pool, since_s=now_s, why=odd.why)
            for odd in odd_nodes(standing, since_s=now_s - limit_s)
            if (odd.pool, odd.host) not in known
        ]
        if fresh or len(kept) < len(view.memory.quarantine):
            self.record.note_quarantine((*kept, *fresh))
        for suspect in fresh:
            text = f"node {suspect.host} of pool {suspect.pool} is avoided from now on: {suspect.why}"
            self.observer.note(text)
            for listener in self.listeners:
                listener.drifted(view, f"node:{suspect.host}:{suspect.since_s:.0f}", text, standing)

    def _publish(self, standing: Standing) -> None:
        """Plots and deployment files for the dashboard, which portions of a study leave to who gives them out."""
        history = self._looker.history(standing.record.study)
        if history is None:
            return
        study = standing.cell.study.model_copy(update={"name": history.name})
        report = make_report(history, study)
        try:
            with take_lease(self.storage, history.name, lease_times()):
                publish(self.storage, report)
                lines = attach_deployments(self.storage, self.place, report, study)
        except StudyBusyError as error:  # someone runs it by hand, and that run leaves them
            lines = (str(error),)
        for line in lines:
            self.observer.note(line)

    def _why_closed(self, standing: Standing, last: Slice) -> str | None:
        """Why a study gets no more candidates; None where it may."""
        own = standing.cell.study.budget
        failed = failed_in_a_row(self.record.memory().slices_of(standing.cell.name))
        min_gain, patience = least_gain(own, self.campaign)
        ended = last.end.reason if last.end else ""
        reasons = (
            (f"given up, {len(failed)} of its last slices failed: {ended}", self._is_given_up(failed)),
            (str(StopReason.TRIALS), standing.progress.finished >= own.trials),
            (str(StopReason.DEVICE_HOURS), _used(own.device_hours, standing.spent.device_hours)),
            (str(StopReason.COST), _used(own.cost, standing.spent.dollars)),
            (str(StopReason.LITTLE_GAIN), standing.progress.little_gain(min_gain, patience)),
            (HOPELESS, standing.is_hopeless(min_gain, patience)),
            (str(StopReason.SPACE_EXHAUSTED), last.kind is SliceKind.SEARCH and ended == StopReason.SPACE_EXHAUSTED),
        )
        return next((reason for reason, holds in reasons if holds), None)

    def _is_given_up(self, failed: Sequence[Slice]) -> bool:
        return len(failed) >= self.campaign.rules.close.failed_slices

    def _reason_of(self, study: str) -> str:
        """Why the last run of `study` ended, as its log has it."""
        lines = [event.text for event in read_events(self.storage, study)[-20:]]
        found = [line.removeprefix(ENDED_BY) for line in lines if line.startswith(ENDED_BY)]
        return found[-1] if found else "its log does not say why"


def _used(limit: float | None, taken: float) -> bool:
    return limit is not None and taken >= limit


def _above(base: float, more: float | None) -> float | None:
    """A limit of a study's whole life; None where there is none. At least a trifle above what it has taken."""
    return None if more is None or math.isinf(more) else base + max(more, 1e-9)


def least_gain(own: BudgetSection, campaign: Campaign) -> tuple[float, int]:
    """Expected growth below which a study is done, and how often: its own where it says so, else the campaign's."""
    if own.min_gain is not None:
        return own.min_gain, own.patience
    return campaign.rules.close.min_gain, campaign.rules.close.patience


def portion_of(slice_: Slice, study: StudyFile, wall_s: float | None, campaign: Campaign) -> BudgetSection:
    """The budget of the run that carries out `slice_`."""
    own = study.budget
    min_gain, patience = least_gain(own, campaign)
    limits = {
        "trials": slice_.trials,
        "device_hours": smaller(slice_.device_hours, own.device_hours),
        "cost": smaller(slice_.dollars, own.cost),
        "wall_time": smaller(wall_s, own.wall_time),
        "confirm": own.confirm if slice_.kind is SliceKind.CONFIRM else 1,
    }
    if slice_.kind is SliceKind.SEARCH:
        limits |= {"min_gain": min_gain, "patience": patience}
    return own.model_copy(update=limits)


def failed_in_a_row(slices: Sequence[Slice]) -> tuple[Slice, ...]:
    """The last slices of a cell that failed, one after the other."""
    failed: list[Slice] = []
    for slice_ in slices:
        if slice_.end is not None:
            failed = [*failed, slice_] if slice_.end.failed else []
    return tuple(failed)
