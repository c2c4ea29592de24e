"""What a storage remembers of a campaign, and how it is written: see `studies.campaign_store`.

Everything that a runner decides is written before it is done, and everything that it needs to decide is read from the
storage: so whoever takes the campaign's lease goes on where the last one was.

- `rules` (YAML) and `cells`: what is asked, resolved;
- `cell.NAME`: the study that a cell is at, and why it was closed;
- `slice.00001`: a portion of the budget that was given to a study, and how it ended;
- `pause`: an order, written by anybody; `ended`: why the campaign is over; `told`: what webhooks have been told,
  and `outbox`: what has not left yet;
- `quarantine`: nodes that are avoided, by node pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import cast

from studies.campaign_store import CampaignStore
from studies.codec import Json, from_json, to_json
from tuner.campaigns.campaign import Campaign, StoredCell, dump_rules, from_stored, stored_cells
from tuner.campaigns.webhooks import Parcel

RULES, CELLS, PAUSE, ENDED = "rules", "cells", "pause", "ended"
TOLD, OUTBOX, QUARANTINE = "told", "outbox", "quarantine"
_CELL, _SLICE = "cell.", "slice."
MOST_TOLD = 2000


class SliceKind(StrEnum):
    """What a slice is for: new candidates, the final runs of a front, or the best one once more."""

    SEARCH = "search"
    CONFIRM = "confirm"
    CHECK = "check"


@dataclass(frozen=True, kw_only=True)
class SliceEnd:
    """How a slice ended: why, in words, what it took, and candidates that were measured in it.

    `volume` is the hypervolume of the study's front then, relative to that before the slice; None where there was none.
    """

    at_s: float
    reason: str
    measured: int
    device_hours: float
    dollars: float
    failed: bool = False
    volume: float | None = None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A portion of the budget: the study may go to so many `trials`, device-hours and dollars of its whole life.

    `worth` is the gain that was expected per share of the remaining budget, None for a study that had not begun.
    `before_hours` and `before_dollars` are what the study had taken when it was given out. In a check, `trial` is to
    have so many `runs`.
    """

    number: int
    cell: str
    study: str
    kind: SliceKind
    begun_s: float
    why: str
    trials: int
    device_hours: float | None = None
    dollars: float | None = None
    worth: float | None = None
    before_hours: float = 0.0
    before_dollars: float = 0.0
    before_measured: int = 0
    trial: int | None = None
    runs: int | None = None
    end: SliceEnd | None = None


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """Where a cell stands: `study` is the one of its `generation`; `closed` says why it is, None while it is open.

    `earlier` are the studies of generations before. `checked` are changes for which its best configuration was measured
    again.
    """

    cell: str
    study: str
    generation: int = 1
    closed: str | None = None
    closed_s: float | None = None
    earlier: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pause:
    """An order that nothing is measured until it is taken back: when (seconds since the epoch), and by whom."""

    at_s: float
    by: str


@dataclass(frozen=True, kw_only=True)
class End:
    """Why and when a campaign ended."""

    at_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A node that is avoided: since when, and why."""

    host: str
    pool: str
    since_s: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """All that is stored, as of one reading."""

    cells: Mapping[str, CellRecord] = field(default_factory=dict)
    slices: tuple[Slice, ...] = ()
    pause: Pause | None = None
    ended: End | None = None
    told: tuple[str, ...] = ()
    outbox: tuple[Parcel, ...] = ()
    quarantine: tuple[Suspect, ...] = ()

    def slices_of(self, cell: str) -> tuple[Slice, ...]:
        """Slices of a cell, in order."""
        return tuple(found for found in self.slices if found.cell == cell)


class Record:
    """Reads and writes what is stored of one campaign; writing is for the holder of its lease, `order_pause` apart."""

    def __init__(self, store: CampaignStore) -> None:
        self.store = store

    @property
    def is_begun(self) -> bool:
        """True where the campaign has been written."""
        return RULES in self.store.read()

    def asked(self) -> tuple[Json, Json]:
        """What is asked, as it is stored: two equal answers make equal campaigns."""
        found = self.store.read()
        return found.get(RULES), found.get(CELLS)

    def campaign(self) -> Campaign:
        """What is asked."""
        found = self.store.read()
        return from_stored(str(found[RULES]), _cells(found), self.store.storage.dashboard_url)

    def cells(self) -> tuple[StoredCell, ...]:
        """The stored cells."""
        return _cells(self.store.read())

    def begin(self, campaign: Campaign) -> None:
        """Write what is asked; the rules go last: without them nothing here has happened."""
        self.store.note(CELLS, to_json(stored_cells(campaign)))
        self.store.note(RULES, dump_rules(campaign.rules))

    def memory(self) -> Memory:
        """All of the rest."""
        found = self.store.read()
        cells = [from_json(CellRecord, data) for key, data in found.items() if key.startswith(_CELL)]
        return Memory(
            cells={cell.cell: cell for cell in cells},
            slices=tuple(from_json(Slice, found[key]) for key in sorted(found) if key.startswith(_SLICE)),
            pause=_pause(found),
            ended=None if found.get(ENDED) is None else from_json(End, found[ENDED]),
            told=tuple(map(str, cast("list[Json]", found.get(TOLD, [])))),
            outbox=tuple(from_json(Parcel, data) for data in cast("list[Json]", found.get(OUTBOX, []))),
            quarantine=tuple(from_json(Suspect, data) for data in cast("list[Json]", found.get(QUARANTINE, []))),
        )

    def pause(self) -> Pause | None:
        """The order to pause, None where there is none."""
        return _pause(self.store.read())

    def note_cell(self, cell: CellRecord) -> None:
        """Remember where a cell stands."""
        self.store.note(f"{_CELL}{cell.cell}", to_json(cell))

    def note_slice(self, slice_: Slice) -> None:
        """Remember a slice, before it begins and again when it has ended."""
        self.store.note(f"{_SLICE}{slice_.number:05d}", to_json(slice_))

    def note_end(self, end: End | None) -> None:
        """Remember that the campaign is over, or that it goes on."""
        self.store.note(ENDED, to_json(end))

    def note_told(self, keys: tuple[str, ...]) -> None:
        """Remember what has been told; the oldest is forgotten."""
        self.store.note(TOLD, list(keys[-MOST_TOLD:]))

    def note_outbox(self, parcels: tuple[Parcel, ...]) -> None:
        """Remember what has not left yet."""
        self.store.note(OUTBOX, to_json(parcels))

    def note_quarantine(self, suspects: tuple[Suspect, ...]) -> None:
        """Remember which nodes are avoided."""
        self.store.note(QUARANTINE, to_json(suspects))

    def order_pause(self, pause: Pause | None) -> None:
        """Order that nothing is measured any more, or take it back; anybody may."""
        self.store.note(PAUSE, to_json(pause))


def _cells(found: Mapping[str, Json]) -> tuple[StoredCell, ...]:
    return tuple(from_json(StoredCell, data) for data in cast("list[Json]", found.get(CELLS, [])))


def _pause(found: Mapping[str, Json]) -> Pause | None:
    return None if found.get(PAUSE) is None else from_json(Pause, found[PAUSE])


def closed(cell: CellRecord, reason: str, at_s: float) -> CellRecord:
    """`cell`, closed."""
    return replace(cell, closed=reason, closed_s=at_s)
