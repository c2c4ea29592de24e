"""The two ways of spending one budget: a campaign, and the same studies alone with equal shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.campaigns.world import Yardstick, connector
from search_spaces.problem import Problem
from studies.history import StudyHistory
from studies.records import Proposal, TrialRecord
from studies.spending import spent
from studies.stopping import progress_of
from studies.storage import Storage, open_storage
from tuner.access import Connect
from tuner.campaigns.campaign import Campaign, load_campaign
from tuner.campaigns.look import View
from tuner.campaigns.open import begin, campaign_lease
from tuner.campaigns.run import CampaignRun, least_gain
from tuner.campaigns.slices import SlicesHere
from tuner.observer import Observer, Snapshot
from tuner.places import Place, find_place
from tuner.session import run_study
from tuner.study_schema import StudyFile


@dataclass
class Quiet:
    """An observer of campaigns and studies that keeps the notes, and writes each to `log` where there is one."""

    notes: list[str] = field(default_factory=list)
    log: Path | None = None

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    def study(self, _name: str) -> Observer:
        """Itself."""
        return self

    def begun(self, proposal: Proposal) -> None:
        """Nothing to keep."""

    def ended(self, record: TrialRecord, _problem: Problem) -> None:
        """One line: what waits for a trial to end counts these."""
        if self.log is not None:
            self.note(f"trial {record.number} ended")

    def now(self, view: View | Snapshot) -> None:
        """Nothing to keep."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The mean share of hypervolume of all studies once so many device-hours were spent."""

    device_hours: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one way of spending a budget came to. `shares` are the ends of its studies, `curve` the way there."""

    device_hours: float
    trials: int
    shares: Mapping[str, float]
    curve: tuple[Step, ...]
    reason: str = ""
    measured_twice: int = 0
    left_open: int = 0

    @property
    def share(self) -> float:
        """Mean share of hypervolume at the end."""
        return sum(self.shares.values()) / len(self.shares)

    def by(self, device_hours: float) -> Step:
        """Where it stood when no more than so many device-hours were spent."""
        before = [step for step in self.curve if step.device_hours <= device_hours]
        return before[-1] if before else Step(device_hours=0.0, share=0.0)

    def hours_to(self, share: float) -> float | None:
        """Device-hours after which the mean share was reached; None where it never was."""
        return next((step.device_hours for step in self.curve if step.share >= share), None)


def place_at(folder: Path) -> Place:
    """A storage in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return find_place(f"sqlite:///{folder / 'studies.db'}")


def run_campaign_here(file: Path, folder: Path, seed: int, log: Path | None = None) -> str | None:
    """Run the campaign of `file` in the world `seed`, or go on with it, and return why it is over."""
    campaign, _ = load_campaign(file)
    place = place_at(folder)
    storage = open_storage(place.url)

    def connect(study: StudyFile, _avoid: tuple[str, ...]) -> Connect:
        return connector(study, seed)

    with campaign_lease(storage, campaign.name) as lease:
        record = begin(storage, campaign)
        run = CampaignRun(
            campaign=record.campaign(),
            record=record,
            storage=storage,
            place=place,
            lease=lease,
            slices=SlicesHere(connector=connect, place=place, stop_requested=lambda: False),
            observer=Quiet(log=log),
            stop_requested=lambda: False,
            sleep=lambda _: None,
            retry_s=0.0,
        )
        return run.run()


def campaign_arm(file: Path, folder: Path, seed: int, rods: Mapping[str, Yardstick]) -> Arm:
    """The campaign, run to its end."""
    reason = run_campaign_here(file, folder, seed)
    return judged_campaign(file, folder, rods, reason=reason or "it was stopped")


def judged_campaign(file: Path, folder: Path, rods: Mapping[str, Yardstick], *, reason: str) -> Arm:
    """What is stored of a campaign, judged."""
    campaign, _ = load_campaign(file)
    storage = open_storage(place_at(folder).url)
    found = trials_of(storage, campaign)
    ordered = sorted(
        ((trial.ended_at, name, trial) for name, trials in found.items() for trial in trials if trial.ended_at),
        key=lambda row: row[0],
    )
    known: dict[str, list[TrialRecord]] = {name: [] for name in found}
    shares = dict.fromkeys(found, 0.0)
    hours, curve = 0.0, []
    for _, name, trial in ordered:
        known[name].append(trial)
        hours += spent([trial], rods[name].truth.problem).device_hours
        shares[name] = rods[name].share(known[name])
        curve.append(Step(device_hours=hours, share=sum(shares.values()) / len(shares)))
    keys = [(name, t.key) for name, trials in found.items() for t in trials if t.is_finished and not t.is_repeat]
    return Arm(
        device_hours=hours,
        trials=len(keys),
        shares=shares,
        curve=tuple(curve),
        reason=reason,
        measured_twice=len(keys) - len(set(keys)),
        left_open=sum(not t.ended_at and t.started_at is not None for trials in found.values() for t in trials),
    )


def trials_of(storage: Storage, campaign: Campaign) -> dict[str, Sequence[TrialRecord]]:
    """The trials of every study of a campaign, by study."""
    return {cell.name: StudyHistory(storage, cell.name).trials() for cell in campaign.cells}


def equal_shares(file: Path, folder: Path, seed: int, rods: Mapping[str, Yardstick]) -> tuple[Arm, Arm]:
    """Each study alone, with its part of the budget, and nothing learnt from another.

    Then the same as if each had ended by the rule that closes a study of the campaign.
    """
    campaign, _ = load_campaign(file)
    budget = campaign.rules.budget.device_hours or 0.0
    share = budget / len(campaign.cells)
    place = place_at(folder)
    paths: dict[str, list[Step]] = {}
    closed: dict[str, list[Step]] = {}
    for cell in campaign.cells:
        limits = cell.study.budget.model_copy(update={"device_hours": share})
        study = cell.study.model_copy(update={"budget": limits, "earlier_studies": "none"})
        run_alone(study, place, seed)
        paths[cell.name] = path_of(study.name, place, rods[cell.name])
        closed[cell.name] = paths[cell.name][: _until_closed(study, place, campaign)]
    return _alone(paths), _alone(closed)


def _until_closed(study: StudyFile, place: Place, campaign: Campaign) -> int:
    """Trials after which the campaign's rule would have closed a study; all of them where it would not have."""
    trials = ended_trials(study.name, place)
    least, patience = least_gain(study.budget, campaign)
    counts = range(1, len(trials) + 1)
    return next((n for n in counts if progress_of(trials[:n]).little_gain(least, patience)), len(trials))


def _alone(paths: Mapping[str, Sequence[Step]]) -> Arm:
    """Studies that run at once at the same pace."""
    ends = {name: path[-1] if path else Step(device_hours=0.0, share=0.0) for name, path in paths.items()}
    return Arm(
        device_hours=sum(end.device_hours for end in ends.values()),
        trials=sum(len(path) for path in paths.values()),
        shares={name: end.share for name, end in ends.items()},
        curve=together(list(paths.values())),
    )


def run_alone(study: StudyFile, place: Place, seed: int) -> None:
    """One study, to its end."""

    @contextmanager
    def never() -> Iterator[object]:
        yield lambda: False

    run_study(study, place, connect=connector(study, seed), stop=never(), observer=Quiet())  # type: ignore[arg-type]


def path_of(name: str, place: Place, rod: Yardstick) -> list[Step]:
    """The share of a study after each of its trials."""
    ended = ended_trials(name, place)
    hours, path = 0.0, []
    for count, trial in enumerate(ended, start=1):
        hours += spent([trial], rod.truth.problem).device_hours
        path.append(Step(device_hours=hours, share=rod.share(ended[:count])))
    return path


def ended_trials(name: str, place: Place) -> list[TrialRecord]:
    """The trials of a study in the order in which they ended."""
    trials = [t for t in StudyHistory(open_storage(place.url), name).trials() if t.ended_at]
    return sorted(trials, key=lambda trial: (trial.ended_at, trial.number) if trial.ended_at else (None, 0))


def together(paths: Sequence[Sequence[Step]]) -> tuple[Step, ...]:
    """Studies that run at once at the same pace, as one curve."""
    moments = sorted({step.device_hours for path in paths for step in path})
    curve = []
    for moment in moments:
        reached = [max((s.share for s in path if s.device_hours <= moment), default=0.0) for path in paths]
        used = sum(max((s.device_hours for s in path if s.device_hours <= moment), default=0.0) for path in paths)
        curve.append(Step(device_hours=used, share=sum(reached) / len(paths)))
    return tuple(curve)
