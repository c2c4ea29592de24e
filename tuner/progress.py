"""How a running search is shown: a live view in a terminal, one line per event elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search_spaces.metrics import METRICS
from search_spaces.problem import Problem
from studies.records import Proposal, TrialRecord, TrialStatus
from tuner.observer import RECENT_TRIALS, Snapshot
from tuner.report import StudyReport, best, mark, metrics_of
from tuner.wording import candidate_text, duration, number, rate_text, repeats_text

_RECENT = 6
SHARE = 0.05
"""Share of the time that drawing takes at most: the thread that draws is the one that proposes and polls."""


def proposal_line(proposal: Proposal) -> str:
    """Number, origin and configuration of a trial that begins."""
    again = f", try {proposal.attempt}" if proposal.attempt > 1 else ""
    again += f", repeats trial {proposal.repeat_of}" if proposal.repeat_of is not None else ""
    return f"trial {proposal.trial_number} ({proposal.origin}{again}): {candidate_text(proposal.candidate)}"


def record_line(record: TrialRecord, problem: Problem) -> str:
    """What became of a trial: its objectives, beside what was predicted, or why it failed."""
    if record.failure is not None:
        return f"trial {record.number} {record.status}: {record.failure.reason}: {record.failure.detail}"
    metrics = metrics_of(record)
    figures = ", ".join(_figure(objective.metric, record, metrics) for objective in problem.objectives)
    missed = [slo.metric for slo in problem.slos if record.violations.get(slo.metric, 0.0) > 0]
    suffix = f"; misses the SLO on {', '.join(missed)}" if missed else ""
    verb = "emulated" if record.measurement is not None and record.measurement.emulated else "measured"
    searched = record.measurement is not None and record.measurement.probes
    rate = f"; highest rate {rate_text(*record.measurement.highest_rate)}" if record.measurement and searched else ""
    return f"trial {record.number} {verb}: {figures}{rate}{suffix}"


def _figure(metric: str, record: TrialRecord, metrics: dict[str, float]) -> str:
    predicted = record.prediction.metrics.get(metric) if record.prediction else None
    aside = f" (predicted {number(predicted)})" if predicted is not None else ""
    return f"{metric}={number(metrics[metric])}{aside}"


def _report(snapshot: Snapshot) -> StudyReport:
    return StudyReport(
        name=snapshot.name, status="running", problem=snapshot.problem, trials=snapshot.trials, storage=""
    )


def counts_text(snapshot: Snapshot) -> str:
    """Trials done, failed and lost, candidates screened out, hypervolume and time left."""
    report = _report(snapshot)
    done, failed = report.count(TrialStatus.MEASURED), report.count(TrialStatus.FAILED)
    parts = [f"{done + failed} of {snapshot.budget_trials} trials", f"{failed} failed"]
    lost = report.count(TrialStatus.LOST)
    if lost:
        parts.append(f"{lost} lost and repeated")
    if report.repeats:
        parts.append(repeats_text(report.repeats))
    parts += [f"{snapshot.screened_out:,} screened out by the model", _hypervolume_text(snapshot)]
    if snapshot.time_left_s is not None:
        parts.append(f"{duration(snapshot.time_left_s)} left")
    return ", ".join(parts)


def _hypervolume_text(snapshot: Snapshot) -> str:
    if snapshot.recent_gain is None:
        return f"hypervolume {number(snapshot.hypervolume)}"
    return f"hypervolume {number(snapshot.hypervolume)} ({snapshot.recent_gain:+.0%} over {RECENT_TRIALS} trials)"


@dataclass
class LineProgress:
    """One line per event, for logs and pipes."""

    console: Console
    clock: Callable[[], float] = time.monotonic
    _began: float | None = None
    _shown: int = -1

    def __enter__(self) -> Self:
        """Nothing to set up."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to clean up."""

    def _line(self, text: str) -> None:
        if self._began is None:
            self._began = self.clock()
        stamp = f"[{self.clock() - self._began:6.1f} s]"
        self.console.print(Text(f"{stamp} {text}"), soft_wrap=True)

    def note(self, text: str) -> None:
        """Print `text`."""
        self._line(text)

    def begun(self, proposal: Proposal) -> None:
        """Print what is tried."""
        self._line(proposal_line(proposal))

    def ended(self, record: TrialRecord, problem: Problem) -> None:
        """Print what came of it."""
        self._line(record_line(record, problem))

    def now(self, snapshot: Snapshot) -> None:
        """Print the counts after every finished trial."""
        finished = sum(trial.is_finished for trial in snapshot.trials)
        if self._shown not in (-1, finished):
            self._line(f"        {counts_text(snapshot)}")
        self._shown = finished


@dataclass
class LiveProgress:
    """A view that is drawn anew several times a second, of a large study so often that it takes `SHARE` of the time."""

    console: Console
    clock: Callable[[], float] = time.monotonic
    _next_s: float = -math.inf
    _recent: list[Text] = field(default_factory=list)
    _live: Live | None = None

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the screen to what follows."""
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line above the view."""
        self.console.print(Text(text, style="dim"))

    def begun(self, proposal: Proposal) -> None:
        """Shown by the next `now`."""

    def ended(self, record: TrialRecord, problem: Problem) -> None:
        """Among the recent results."""
        style = {TrialStatus.MEASURED: "", TrialStatus.FAILED: "red"}.get(record.status, "yellow")
        if record.status is TrialStatus.MEASURED and not record.feasible:
            style = "dim"
        self._recent = [*self._recent[-_RECENT + 1 :], Text(record_line(record, problem), style=style)]

    def now(self, snapshot: Snapshot) -> None:
        """Draw `snapshot`, where it is time for it."""
        began_s = self.clock()
        if self._live is not None and began_s >= self._next_s:
            self._live.update(self._view(snapshot))
            self._next_s = began_s + (self.clock() - began_s) / SHARE

    def _view(self, snapshot: Snapshot) -> RenderableType:
        finished = sum(trial.is_finished and not trial.is_repeat for trial in snapshot.trials)
        parts: list[RenderableType] = [
            Text(f"{snapshot.name}{mark(_report(snapshot))}", style="bold"),
            _bar(finished, snapshot.budget_trials),
            Text(counts_text(snapshot)),
            *(
                Text(f"{trial.phase} {trial.elapsed_s:.0f} s: {proposal_line(trial.proposal)}", style="cyan")
                for trial in snapshot.trying
            ),
            *self._recent,
        ]
        return Group(*parts, _best_table(_report(snapshot)))


def _bar(done: int, total: int) -> RenderableType:
    """A progress bar on a line of its own."""
    grid = Table.grid()
    grid.add_row(ProgressBar(total=total, completed=done, width=60))
    return grid


def _best_table(report: StudyReport) -> RenderableType:
    table = Table(box=box.SIMPLE, title="best so far", title_justify="left")
    table.add_column("objective")
    table.add_column("value", justify="right")
    table.add_column("configuration", overflow="fold")
    for metric, trial in best(report).items():
        text = candidate_text(trial.candidate) if trial.candidate else ""
        table.add_row(metric, f"{number(metrics_of(trial)[metric])} {METRICS[metric].unit}", Text(text))
    return table if table.row_count else Text("no trial meets every SLO yet", style="dim")
