"""Daily caps, pauses and deadlines in a running campaign, with a clock that only its waiting moves on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from studies.history import StudyHistory
from studies.records import Origin, TrialRecord, TrialStatus
from studies.storage import Storage, open_storage
from tests.studies.toy import measure
from tests.tuner.test_campaign_run import CAMPAIGN
from tests.tuner.test_campaign_watch import Watcher
from tuner.campaigns.campaign import Campaign, load_campaign
from tuner.campaigns.look import Looker
from tuner.campaigns.open import begin, campaign_lease
from tuner.campaigns.record import Pause
from tuner.campaigns.run import DEADLINE, CampaignRun
from tuner.campaigns.slices import Order
from tuner.observer import Observer
from tuner.places import Place
from tuner.wiring import make_problem, make_space

BERLIN = ZoneInfo("Europe/Berlin")
MONDAY = datetime(2027, 1, 11, 10, tzinfo=UTC)
"""When every campaign here begins: 11:00 in Berlin."""
STEP, TRIAL = timedelta(minutes=20), timedelta(hours=1)
"""How far each look at the campaign moves the clock, and how long a trial holds its one device."""


@dataclass
class Cluster:
    """Carries out slices side by side: a trial of `TRIAL` after the other, until a limit of the portion is reached."""

    campaign: Campaign
    now: datetime = MONDAY
    at_once: int = 2
    orders: list[tuple[datetime, Order]] = field(default_factory=list)
    trials: dict[str, list[TrialRecord]] = field(default_factory=dict)
    at: dict[datetime, Callable[[], None]] = field(default_factory=dict)
    _running: dict[str, tuple[datetime, datetime, Order]] = field(default_factory=dict)
    _ended: dict[str, str | None] = field(default_factory=dict)

    def clock(self) -> datetime:
        return self.now

    def sleep(self, _seconds: float) -> None:
        """Time passes here alone."""
        self.now += STEP
        for moment in [moment for moment in self.at if moment <= self.now]:
            self.at.pop(moment)()
        for name, (begun, trial, order) in tuple(self._running.items()):
            if self.now >= trial + TRIAL:
                self._measured(order, trial)
                self._running[name] = (begun, trial + TRIAL, order)
                self._end_where_used(name)

    def _measured(self, order: Order, began: datetime) -> None:
        known = self.trials.setdefault(order.study.name, [])
        candidate = make_space(order.study, make_problem(order.study)).default()
        outcome = replace(measure(candidate), timings_s={"measure": TRIAL.total_seconds()})
        known.append(
            TrialRecord(
                number=len(known),
                status=TrialStatus.MEASURED,
                candidate=candidate,
                key=f"candidate {len(known)}",
                origin=Origin.SCREENED,
                prediction=None,
                outcome=outcome,
                values=(1.0, 1.0),
                expected_gain=0.5,
                started_at=_as_stored(began),
                ended_at=_as_stored(began + TRIAL),
            )
        )

    def _end_where_used(self, name: str) -> None:
        begun, trial, order = self._running[name]
        limits, done = order.portion, len(self.trials.get(name, ()))
        late = limits.wall_time is not None and (trial - begun).total_seconds() >= limits.wall_time
        dear = limits.device_hours is not None and done * TRIAL.total_seconds() / 3600 >= limits.device_hours
        if done >= limits.trials or late or dear:
            del self._running[name]
            self._ended[name] = None

    def start(self, order: Order, _observer: Observer) -> None:
        self.orders.append((self.now, order))
        self._running[order.study.name] = (self.now, self.now, order)
        self._end_where_used(order.study.name)

    def ended(self) -> dict[str, str | None]:
        found, self._ended = self._ended, {}
        return found

    def stop(self) -> None:
        """What runs is given back."""
        self._ended |= dict.fromkeys(self._running)
        self._running.clear()

    close = stop

    @property
    def spans(self) -> list[tuple[datetime, datetime]]:
        """Begin and end of every trial, in the order of their ends."""
        trials = [trial for known in self.trials.values() for trial in known]
        found = [(t.started_at, t.ended_at) for t in trials if t.started_at is not None and t.ended_at is not None]
        return sorted((begin.astimezone(UTC), end.astimezone(UTC)) for begin, end in found)


def _as_stored(moment: datetime) -> datetime:
    """Optuna stores local times without a zone."""
    return moment.astimezone().replace(tzinfo=None)


@dataclass
class Memories(Looker):
    """Looks at the trials that a cluster has measured, in place of those of a storage."""

    cluster: Cluster | None = None

    def history(self, study: str) -> StudyHistory | None:
        trials = tuple(self.cluster.trials.get(study, ())) if self.cluster else ()
        return _Stored(trials) if trials else None  # type: ignore[return-value]  # a history by its trials


@dataclass
class _Stored:
    found: tuple[TrialRecord, ...]

    def trials(self) -> tuple[TrialRecord, ...]:
        return self.found


@dataclass
class Told:
    """What a campaign came to."""

    cluster: Cluster
    run: CampaignRun
    watcher: Watcher
    storage: Storage

    def says(self, text: str) -> bool:
        return any(text in note for note in self.watcher.notes)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Told]]:
    """Begins a campaign of two studies of six trials, with more rules: all that is left is to run it."""
    monkeypatch.setattr(CampaignRun, "_publish", lambda _run, _standing: None)
    place = Place(url=f"sqlite:///{tmp_path}/studies.db", directory=tmp_path)
    storage = open_storage(place.url)
    with campaign_lease(storage, "many") as lease:

        def make(rules: str, budget: str = "device_hours: 100") -> Told:
            text = CAMPAIGN.replace("trials: 4,", "trials: 6,").replace("device_hours: 100", budget)
            (tmp_path / "campaign.yaml").write_text(f"{text}{rules}\n")
            campaign, _ = load_campaign(
                tmp_path / "campaign.yaml", ["slices.side_by_side=2", "watch={environment: false, quarantine: false}"]
            )
            record, cluster, watcher = begin(storage, campaign), Cluster(campaign), Watcher()
            run = CampaignRun(
                campaign=record.campaign(),
                record=record,
                storage=storage,
                place=place,
                lease=lease,
                slices=cluster,
                observer=watcher,
                stop_requested=lambda: cluster.now > MONDAY + timedelta(days=30),
                clock=cluster.clock,
                sleep=cluster.sleep,
            )
            run._looker = Memories(storage=storage, campaign=run.campaign, cluster=cluster)
            return Told(cluster, run, watcher, storage)

        yield make


def test_no_day_takes_more_than_its_share_and_the_next_one_goes_on(begun: Callable[..., Told]) -> None:
    told = begun("per_day: {device_hours: 5, zone: Europe/Berlin}")
    assert str(told.run.run()).startswith("nothing is left to gain")
    days = Counter(end.astimezone(BERLIN).date() for _, end in told.cluster.spans)
    assert sum(days.values()) == 12
    assert [days[day] for day in sorted(days)] == [5, 5, 2]
    assert told.says("today's share of the budget is used; it goes on tomorrow (midnight in Europe/Berlin)")
    second = min(began for began, _ in told.cluster.spans if began.astimezone(BERLIN).date() != MONDAY.date())
    midnight = datetime(2027, 1, 12, tzinfo=BERLIN)
    assert midnight <= second <= midnight + STEP, "it begins with the day of its own zone"


def test_in_a_pause_of_the_week_nothing_begins_and_slices_end_before_it(begun: Callable[..., Told]) -> None:
    told = begun("pauses: [{days: [mon, tue], begin: '12:30', end: '20:00', zone: Europe/Berlin}]")
    assert str(told.run.run()).startswith("nothing is left to gain")
    spans = told.cluster.spans
    assert len(spans) == 12
    begins = [began.astimezone(BERLIN) for began, _ in spans]
    assert not [began for began in begins if (12, 30) <= (began.hour, began.minute) < (20, 0)], "no trial begins in it"
    assert {began.hour >= 20 for began in begins} == {True, False}, "before it, and after"
    assert told.says("nothing is begun: in a pause of the week until 2027-01-11 20:00 CET")
    assert told.says("it goes on")
    first = told.cluster.orders[0][1].portion
    assert first.wall_time == pytest.approx(1.5 * 3600), "a slice is told when the pause begins"


def test_at_its_deadline_it_is_over_and_no_trial_begins_after_it(begun: Callable[..., Told]) -> None:
    deadline = MONDAY + timedelta(hours=2, minutes=30)
    told = begun("", budget=f"deadline: '{deadline.isoformat()}'")
    assert told.run.run() == DEADLINE
    assert [began < deadline for began, _ in told.cluster.spans] == [True] * 6, "two studies side by side"
    ended = told.run.record.memory().ended
    assert ended is not None
    assert ended.reason == DEADLINE
    assert deadline <= datetime.fromtimestamp(ended.at_s, UTC) <= deadline + TRIAL + STEP
    assert all(found.end is not None for found in told.run.record.memory().slices)


def test_an_ordered_pause_gives_back_what_runs_and_the_same_slices_go_on(begun: Callable[..., Told]) -> None:
    told = begun("")
    record, cluster = told.run.record, told.cluster
    pause, again = MONDAY + timedelta(hours=1, minutes=30), MONDAY + timedelta(hours=40)
    cluster.at[pause] = lambda: record.order_pause(Pause(at_s=pause.timestamp(), by="me@here"))
    cluster.at[again] = lambda: record.order_pause(None)
    assert str(told.run.run()).startswith("nothing is left to gain")
    assert len(cluster.spans) == 12
    assert [began for began, end in cluster.spans if began < again and end > pause] == []
    assert told.says("nothing is begun: paused by me@here")
    slices = record.memory().slices
    assert [found.number for found in slices] == list(range(1, len(slices) + 1))
    resumed = [order.study.name for moment, order in cluster.orders if again <= moment <= again + STEP]
    assert sorted(resumed) == sorted(slice_.study for slice_ in slices[:2]), "nothing is given out anew for them"
    assert len(slices) == 6, "two trials each"


def test_the_deadline_ends_a_campaign_that_is_paused(begun: Callable[..., Told]) -> None:
    deadline = MONDAY + timedelta(hours=5)
    told = begun("", budget=f"deadline: '{deadline.isoformat()}'")
    told.run.record.order_pause(Pause(at_s=MONDAY.timestamp(), by="me@here"))
    assert told.run.run() == DEADLINE
    assert told.cluster.orders == []
    assert told.cluster.now >= deadline
