"""How a study stands and who runs it, from what its storage holds: the same from every machine that reaches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from studies.codec import Json
from studies.history import StudyHistory
from studies.lease import is_free, read_lease
from studies.lease_record import LeaseRecord, Seen
from studies.records import TrialRecord, TrialStatus
from studies.stopping import Progress, StopReason, progress_of
from studies.storage import Storage
from tuner.places import Place
from tuner.stored import stored_file
from tuner.study_schema import BudgetSection
from tuner.wording import candidate_text, duration


class State(StrEnum):
    """Of a study."""

    RUNNING = "running"
    STOPPING = "stopping"
    DIED = "its coordinator died"
    STOPPED = "stopped"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class StudyStatus:
    """A study and its coordinator; `budget` is None before its first coordinator has written it.

    `eta_s` is None where nothing has been measured in this run yet, or nothing runs.
    """

    name: str
    storage: str
    state: State
    budget: BudgetSection | None
    ended: StopReason | None
    progress: Progress
    measured: int
    failed: int
    running: tuple[TrialRecord, ...]
    lease: LeaseRecord | None
    now_s: float
    eta_s: float | None


def stored_status(storage: Storage, place: Place, name: str, history: StudyHistory | None) -> StudyStatus:
    """The status of study `name` of `storage`; `history` is None where its first coordinator has not made it yet."""
    trials = history.trials() if history else ()
    budget = stored_file(history, place).budget if history else None
    ended = history.ended if history else None
    return status_of(name, storage.url, trials, read_lease(storage, name), budget, ended)


def status_of(
    name: str,
    storage: str,
    trials: Sequence[TrialRecord],
    seen: Seen,
    budget: BudgetSection | None,
    ended: StopReason | None = None,
) -> StudyStatus:
    """The status of a study of `trials` whose lease was `seen` and whose last run ended by itself for `ended`."""
    progress = progress_of(trials)
    used = budget is not None and progress.finished >= budget.trials
    state = _state(seen, done=used or (ended is not None and ended.is_final))
    return StudyStatus(
        name=name,
        storage=storage,
        state=state,
        budget=budget,
        ended=ended,
        progress=progress,
        measured=sum(trial.status is TrialStatus.MEASURED and not trial.is_repeat for trial in trials),
        failed=sum(trial.status is TrialStatus.FAILED and not trial.is_repeat for trial in trials),
        running=tuple(trial for trial in trials if trial.status is TrialStatus.RUNNING),
        lease=seen.record,
        now_s=seen.now_s,
        eta_s=_eta_s(trials, seen, budget, progress) if budget and state is State.RUNNING else None,
    )


def _state(seen: Seen, *, done: bool) -> State:
    record = seen.record
    if record is None or record.holder is None:
        return State.FINISHED if done else State.STOPPED
    if is_free(seen):
        return State.DIED
    return State.STOPPING if record.stop else State.RUNNING


def _eta_s(trials: Sequence[TrialRecord], seen: Seen, budget: BudgetSection, progress: Progress) -> float | None:
    """Remaining trials at the pace of this run, but no longer than its wall time lasts."""
    record = seen.record
    if record is None or record.holder is None:
        return None
    mine = [trial for trial in trials if trial.lease == record.holder.id]
    starts = [trial.started_at for trial in mine if trial.started_at]
    ends = [trial.ended_at for trial in mine if trial.ended_at and trial.is_finished]
    if not starts or not ends:
        return None
    pace_s = (max(ends) - min(starts)).total_seconds() / len(ends)
    left_s = max(0, budget.trials - progress.finished) * pace_s
    if budget.wall_time is None:
        return left_s
    return max(0.0, min(left_s, record.since_s + budget.wall_time - seen.now_s))


def status_text(status: StudyStatus) -> str:
    """For people."""
    lines = [
        f"{status.name}: {status.state}",
        f"  storage      {status.storage}",
        f"  trials       {_trials_text(status)}",
        *([f"  it ended     {status.ended}"] if status.ended else []),
        *_coordinator_lines(status),
    ]
    if status.eta_s is not None:
        ends = datetime.now(UTC).astimezone() + timedelta(seconds=status.eta_s)
        lines.append(f"  time left    {duration(status.eta_s)} (until about {ends:%Y-%m-%d %H:%M %Z})")
    lines += [
        f"  trial {trial.number:<6} {candidate_text(trial.candidate)}" for trial in status.running if trial.candidate
    ]
    if status.state in (State.DIED, State.STOPPED):
        lines.append(f"  go on with   tuner study resume {status.name}")
    return "\n".join(lines)


def _trials_text(status: StudyStatus) -> str:
    progress = status.progress
    ends = f"{status.measured} measured, {status.failed} failed"
    repeats = f"{progress.repeats} repeats, " if progress.repeats else ""
    others = f"{repeats}{progress.running} running, {progress.waiting} waiting, {progress.lost} lost"
    budget = f" of {status.budget.trials}" if status.budget else ""
    return f"{progress.finished}{budget} ({ends}), {others}"


def _coordinator_lines(status: StudyStatus) -> list[str]:
    record = status.lease
    if record is None or record.holder is None:
        return ["  coordinator  none"]
    since = datetime.fromtimestamp(record.since_s, UTC)
    lines = [
        f"  coordinator  {record.holder}, run {record.run}, since {since:%Y-%m-%d %H:%M:%S} UTC",
        f"  heartbeat    {duration(record.age_s(status.now_s))} ago (its lease ends {record.expiry_s:g} s after one)",
    ]
    if record.stop is not None:
        lines.append(f"  stop         ordered by {record.stop.by} {duration(status.now_s - record.stop.at_s)} ago")
    return lines


def status_json(status: StudyStatus) -> dict[str, Json]:
    """For programs."""
    progress, record = status.progress, status.lease
    return {
        "study": status.name,
        "storage": status.storage,
        "state": status.state.name.lower(),
        "ended": status.ended,
        "trials": {
            "budget": status.budget.trials if status.budget else None,
            "finished": progress.finished,
            "measured": status.measured,
            "failed": status.failed,
            "repeats": progress.repeats,
            "running": [trial.number for trial in status.running],
            "waiting": progress.waiting,
            "lost": progress.lost,
        },
        "eta_s": status.eta_s,
        "coordinator": _coordinator_json(record, status.now_s) if record else None,
    }


def _coordinator_json(record: LeaseRecord, now_s: float) -> Json:
    if record.holder is None:
        return None
    return {
        "host": record.holder.host,
        "pid": record.holder.pid,
        "run": record.run,
        "since_s": record.since_s,
        "heartbeat_age_s": record.age_s(now_s),
        "lease_left_s": record.left_s(now_s),
        "stop_ordered_by": record.stop.by if record.stop else None,
    }
