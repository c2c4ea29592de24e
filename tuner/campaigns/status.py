"""How a campaign stands, for people and for programs: the same from every machine that reaches its storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search_spaces.metrics import METRICS
from studies.campaign_store import campaign_study
from studies.codec import Json
from studies.lease import is_free, read_lease
from studies.lease_record import Seen
from studies.storage import Storage
from tuner.campaigns.look import Looker, View, utc_now
from tuner.campaigns.open import existing
from tuner.campaigns.record import Slice
from tuner.campaigns.standing import Standing, failures
from tuner.report import metrics_of
from tuner.wiring import is_emulated
from tuner.wording import duration, number


class State(StrEnum):
    """Of a campaign."""

    RUNNING = "running"
    WAITING = "waiting"
    STOPPING = "stopping"
    PAUSED = "paused"
    DIED = "its runner died"
    STOPPED = "stopped"
    OVER = "over"


@dataclass(frozen=True, kw_only=True)
class CampaignStatus:
    """A campaign as it is stored, and who runs it."""

    view: View
    seen: Seen
    storage: str

    @property
    def state(self) -> State:
        """What it does."""
        record, memory = self.seen.record, self.view.memory
        if memory.ended is not None:
            return State.OVER
        if record is None or record.holder is None:
            return State.PAUSED if memory.pause else State.STOPPED
        if is_free(self.seen):
            return State.DIED
        if record.stop is not None:
            return State.STOPPING
        if memory.pause is not None:
            return State.PAUSED
        return State.WAITING if self.view.hold() is not None and not self.running else State.RUNNING

    @property
    def running(self) -> tuple[Slice, ...]:
        """Slices that have not ended."""
        return tuple(found for found in self.view.memory.slices if found.end is None)


def status_at(storage: Storage, view: View) -> CampaignStatus:
    """The campaign of `view`, and who runs it now."""
    seen = read_lease(storage, campaign_study(view.campaign.name))
    return CampaignStatus(view=view, seen=seen, storage=storage.url)


def statuses(storage: Storage, name: str) -> Iterator[CampaignStatus]:
    """The campaign as it stands, each time it is asked for; what has ended of it is read once.

    Raises `StudyNotFoundError` where there is none of that name.
    """
    record = existing(storage, name)
    asked, looker = record.asked(), Looker(storage=storage, campaign=record.campaign())
    while True:
        yield status_at(storage, looker.view(record.memory(), utc_now()))
        if record.asked() != asked:
            asked, looker = record.asked(), Looker(storage=storage, campaign=record.campaign())


def best_text(standing: Standing) -> str:
    """The best trial in the first objective, in words."""
    found = standing.best
    if found is None:
        return "-"
    metric = standing.problem.objectives[0].metric
    return f"{number(metrics_of(found)[metric])} {METRICS[metric].unit} (trial {found.number})"


def standing_text(standing: Standing, running: Sequence[Slice]) -> str:
    """What a study does."""
    slices = [found for found in running if found.cell == standing.cell.name]
    if slices:
        return f"slice {slices[0].number}: {slices[0].kind}"
    if standing.record.closed is not None:
        lacking = f", {standing.lacking} runs to confirm" if standing.lacking else ""
        return f"closed: {standing.record.closed}{lacking}"
    return "open" if standing.begun else "not begun"


def status_view(status: CampaignStatus) -> RenderableType:
    """For people: the campaign, its spending, its studies, its pools and failures."""
    view = status.view
    emulated = any(is_emulated(cell.study) for cell in view.campaign.cells)
    title = f"{view.campaign.name}: {status.state}{' (EMULATED)' if emulated else ''}"
    head = [Text(title, style="bold"), *map(Text, _head_lines(status))]
    bars = [bar for bar in (_bar(view),) if bar is not None]
    return Group(*head, *bars, _studies(status), *_pools(status), *map(Text, _tail_lines(status)))


def _head_lines(status: CampaignStatus) -> list[str]:
    view = status.view
    lines = [f"storage   {status.storage}", f"spent     {spent_text(view)}"]
    day = view.campaign.rules.per_day
    if day.device_hours is not None or day.cost is not None:
        limits = _limits(view.today.device_hours, day.device_hours, view.today.dollars, day.cost)
        lines.append(f"today     {limits}")
    if view.deadline is not None:
        left_s = (view.deadline - view.now).total_seconds()
        when = f"{duration(left_s)} left" if left_s > 0 else "it has passed"
        lines.append(f"deadline  {view.deadline.astimezone():%Y-%m-%d %H:%M %Z}, {when}")
    lines += _runner_lines(status)
    if view.memory.ended is not None:
        at = datetime.fromtimestamp(view.memory.ended.at_s, UTC).astimezone()
        lines.append(f"over      {view.memory.ended.reason} ({at:%Y-%m-%d %H:%M %Z})")
    elif (hold := view.hold()) is not None:
        lines.append(f"waits     {hold}")
    return lines


def _runner_lines(status: CampaignStatus) -> list[str]:
    record = status.seen.record
    if record is None or record.holder is None:
        return []
    beat = f"last heartbeat {duration(record.age_s(status.seen.now_s))} ago"
    ordered = f"; ordered to stop by {record.stop.by}" if record.stop else ""
    return [f"runner    {record.holder}, {beat}{ordered}"]


def spent_text(view: View) -> str:
    """Device-hours and dollars, of how many."""
    budget = view.campaign.rules.budget
    return _limits(view.spent.device_hours, budget.device_hours, view.spent.dollars, budget.cost)


def _limits(hours: float, hours_limit: float | None, dollars: float, dollars_limit: float | None) -> str:
    parts = [f"{number(hours)}{f' of {number(hours_limit)}' if hours_limit else ''} device-hours"]
    if dollars > 0 or dollars_limit:
        parts.append(f"${number(dollars)}{f' of ${number(dollars_limit)}' if dollars_limit else ''}")
    return ", ".join(parts)


def used_share(view: View) -> float | None:
    """The share of the budget that is used, the larger one of two; None where only a deadline limits it."""
    budget = view.campaign.rules.budget
    pairs = ((view.spent.device_hours, budget.device_hours), (view.spent.dollars, budget.cost))
    shares = [used / limit for used, limit in pairs if limit]
    return max(shares) if shares else None


def _bar(view: View) -> RenderableType | None:
    share = used_share(view)
    if share is None:
        return None
    grid = Table.grid()
    grid.add_row(ProgressBar(total=1.0, completed=min(1.0, share), width=60), f" {share:.0%} of the budget")
    return grid


def _studies(status: CampaignStatus) -> RenderableType:
    table = Table(box=box.SIMPLE, title="studies", title_justify="left")
    for heading in ("study", "stands"):
        table.add_column(heading, overflow="fold")
    for heading in ("measured", "failed", "device-hours", "next trial"):
        table.add_column(heading, justify="right")
    table.add_column("best so far", overflow="fold")
    for standing in status.view.standings:
        table.add_row(
            standing.record.study,
            standing_text(standing, status.running),
            str(standing.measured),
            str(standing.progress.finished - standing.measured),
            number(standing.total.device_hours),
            f"{standing.growth:+.1%}" if standing.begun and standing.is_open else "-",
            best_text(standing),
        )
    return table


def _pools(status: CampaignStatus) -> list[RenderableType]:
    table = Table(box=box.SIMPLE, title="pools", title_justify="left")
    for heading in ("pool", "used by", "avoided nodes"):
        table.add_column(heading, overflow="fold")
    for pool in pools_of(status.view):
        users = [s.study for s in status.running if pool in status.view.campaign.cell(s.cell).study.node_pools]
        shunned = [suspect.host for suspect in status.view.memory.quarantine if suspect.pool == pool]
        table.add_row(pool, ", ".join(users) or "nobody", ", ".join(shunned) or "-")
    return [table]


def pools_of(view: View) -> tuple[str, ...]:
    """Names of the node pools of all studies."""
    return tuple(dict.fromkeys(pool for cell in view.campaign.cells for pool in cell.study.node_pools))


def _tail_lines(status: CampaignStatus) -> list[str]:
    counts = failures(status.view.standings)
    lines = []
    if counts:
        lines.append("failures: " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))
    if status.state in (State.DIED, State.STOPPED):
        lines.append(f"go on with: tuner campaign resume {status.view.campaign.name}")
    return lines


def status_json(status: CampaignStatus) -> dict[str, Json]:
    """For programs."""
    view, record = status.view, status.seen.record
    budget, day = view.campaign.rules.budget, view.campaign.rules.per_day
    return {
        "campaign": view.campaign.name,
        "storage": status.storage,
        "state": status.state.name.lower(),
        "emulated": any(is_emulated(cell.study) for cell in view.campaign.cells),
        "over": view.memory.ended.reason if view.memory.ended else None,
        "waits_for": view.hold(),
        "spent": {"device_hours": view.spent.device_hours, "dollars": view.spent.dollars, "trials": view.spent.trials},
        "today": {"device_hours": view.today.device_hours, "dollars": view.today.dollars},
        "budget": {"device_hours": budget.device_hours, "dollars": budget.cost, "deadline": budget.deadline},
        "per_day": {"device_hours": day.device_hours, "dollars": day.cost},
        "runner": str(record.holder) if record and record.holder else None,
        "studies": [_standing_json(standing, status) for standing in view.standings],
        "slices": len(view.memory.slices),
        "running": [found.study for found in status.running],
        "pools": list(pools_of(view)),
        "quarantine": [{"host": found.host, "pool": found.pool, "why": found.why} for found in view.memory.quarantine],
        "failures": dict(failures(view.standings)),
    }


def _standing_json(standing: Standing, status: CampaignStatus) -> Json:
    best = standing.best
    return {
        "study": standing.record.study,
        "cell": dict(standing.cell.choices),
        "generation": standing.record.generation,
        "priority": status.view.campaign.priority(standing.cell),
        "open": standing.is_open,
        "closed": standing.record.closed,
        "measured": standing.measured,
        "failed": standing.progress.finished - standing.measured,
        "lost": standing.progress.lost,
        "repeats": standing.progress.repeats,
        "device_hours": standing.total.device_hours,
        "dollars": standing.total.dollars,
        "expected_growth": standing.growth if standing.begun else None,
        "front": [trial.number for trial in standing.front],
        "best": None
        if best is None
        else {"trial": best.number, **{o.metric: metrics_of(best)[o.metric] for o in standing.problem.objectives}},
    }
