"""What of a campaign is worth telling: a new best, drift, repeated failure, the budget, the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from search_spaces.metrics import METRICS
from tuner.campaigns.look import View
from tuner.campaigns.record import Record, Slice
from tuner.campaigns.run import failed_in_a_row
from tuner.campaigns.standing import Standing
from tuner.campaigns.status import spent_text, used_share
from tuner.campaigns.webhooks import Message, Parcel, Post
from tuner.report import metrics_of
from tuner.wiring import is_emulated
from tuner.wording import candidate_text, number

SHARES = (0.5, 0.8, 1.0)
"""Shares of the budget that are told when they are used."""
CLOSE_LIMIT_S = 60.0


@dataclass
class Herald:
    """Makes messages of what happens, and sends each once: what has not left waits in the storage.

    `note` is told of messages that were given up.
    """

    record: Record
    post: Post
    note: Callable[[str], None]
    close_limit_s: float = CLOSE_LIMIT_S
    _outbox: list[Parcel] = field(default_factory=list)
    _told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        memory = self.record.memory()
        self._told = list(memory.told)
        self._outbox = list(memory.outbox)
        for parcel in self._outbox:
            self.post.put(parcel)

    def tell(self, message: Message) -> None:
        """Send `message` to whom it concerns, unless it was told before."""
        if message.key in self._told:
            return
        self._told.append(message.key)
        parcels = self.post.parcels(message)
        self._outbox += parcels
        self.record.note_outbox(tuple(self._outbox))
        self.record.note_told(tuple(self._told))
        for parcel in parcels:
            self.post.put(parcel)

    def settle(self) -> None:
        """Take what has left out of the storage."""
        done = self.post.done()
        for parcel, trouble in done:
            if parcel in self._outbox:
                self._outbox.remove(parcel)
            if trouble is not None:
                self.note(f"{trouble}; {parcel.message.event} was not told: {parcel.message.text}")
        if done:
            self.record.note_outbox(tuple(self._outbox))

    # ------------------------------------------------------------------------------------------------ what happens

    def turned(self, view: View) -> None:
        """The campaign as it stands: how much of its budget is used, and what it waits for."""
        self.settle()
        share = used_share(view) or 0.0
        reached = [part for part in SHARES if share >= part]
        if reached:
            total = view.campaign.rules.budget.device_hours or view.campaign.rules.budget.cost
            text = f"{reached[-1]:.0%} of the budget is used: {spent_text(view)}"
            self._tell(view, "budget", f"budget:{reached[-1]}:{total}", text)
        left = view.left_today
        if any(value is not None and value <= 0 for value in (left.device_hours, left.dollars)):
            self._tell(view, "budget", f"day:{view.now:%Y-%m-%d}", "today's share of the budget is used")

    def ended(self, view: View, slice_: Slice) -> None:
        """A slice has ended: a new best, or a failure that repeats."""
        standing = view.standing(slice_.cell)
        self._best(view, standing)
        failed = failed_in_a_row(view.memory.slices_of(slice_.cell))
        if failed and slice_.end is not None:
            text = f"{slice_.study} failed {len(failed)} time(s) in a row: {slice_.end.reason}"
            self._tell(view, "failure", f"failure:{slice_.number}", text, standing)

    def _best(self, view: View, standing: Standing) -> None:
        best = standing.best
        if best is None or best.candidate is None:
            return
        metric = standing.problem.objectives[0].metric
        figure = f"{number(metrics_of(best)[metric])} {METRICS[metric].unit}".strip()
        mark = " (EMULATED)" if is_emulated(standing.cell.study) else ""
        text = f"new best of {standing.record.study}{mark}: {metric} {figure}, {candidate_text(best.candidate)}"
        key = f"best:{standing.record.study}:{best.number}"
        self._tell(view, "best", key, text, standing)

    def drifted(self, view: View, key: str, text: str, standing: Standing) -> None:
        """Something is not what it was."""
        self._tell(view, "drift", key, text, standing)

    def over(self, view: View, reason: str) -> None:
        """The campaign is over."""
        number_of = len(view.memory.slices)
        self._tell(view, "end", f"end:{number_of}", f"the campaign is over: {reason}; spent {spent_text(view)}")

    def close(self) -> None:
        """Wait until everything has left, for a while."""
        self.post.close(self.close_limit_s)
        self.settle()
        if self._outbox:
            self.note(f"{len(self._outbox)} messages have not left; the next run sends them")

    def _tell(self, view: View, event: str, key: str, text: str, standing: Standing | None = None) -> None:
        self.tell(
            Message(
                key=key,
                event=event,
                text=text,
                campaign=view.campaign.name,
                at_s=view.now.timestamp(),
                study=standing.record.study if standing is not None else None,
                details=dict(standing.cell.choices) if standing is not None else {},
            )
        )
