"""How sure the figures of a study are: intervals, ties, noise and drift, in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from search_spaces.metrics import METRICS, Direction
from search_spaces.problem import Slo
from studies.codec import Json
from studies.noise import LEVEL, OWN_RUNS, Basis, Drift, Interval, Stability, interval_of, is_tie
from studies.records import TrialRecord
from studies.repeats import Runs
from tuner.wording import duration, number

_CERTAIN = 5e-4
"""Relative half-widths below this are not written."""


@dataclass(frozen=True, kw_only=True)
class Spreads:
    """The runs of every candidate of a study, by key, and its noise."""

    runs: Mapping[str, Runs]
    stability: Stability

    def runs_of(self, trial: TrialRecord) -> Runs | None:
        """The finished runs of the candidate of `trial`."""
        return self.runs.get(trial.key) if trial.key is not None else None

    def count(self, trial: TrialRecord) -> int:
        """How often the candidate of `trial` was measured."""
        found = self.runs_of(trial)
        return len(found.measured) if found else 0

    def interval(self, trial: TrialRecord, metric: str) -> Interval | None:
        """The 95% interval of the mean of `metric`; None where nothing says how much it varies."""
        found = self.runs_of(trial)
        return interval_of(found, metric, self.stability.noise.get(metric)) if found else None

    def tied(self, trial: TrialRecord, others: Iterable[TrialRecord], metric: str) -> tuple[int, ...]:
        """Those of `others` that differ in `metric` from `trial` by no more than the noise."""
        mine, noise = self.runs_of(trial), self.stability.noise.get(metric)
        found = [(other.number, self.runs_of(other)) for other in others if other.key != trial.key]
        return tuple(n for n, theirs in found if mine and theirs and is_tie(mine, theirs, metric, noise))

    def ties(self, trial: TrialRecord, others: Sequence[TrialRecord], metrics: Sequence[str]) -> tuple[int, ...]:
        """Those of `others` that differ from `trial` in none of `metrics` by more than the noise."""
        sets = [set(self.tied(trial, others, metric)) for metric in metrics]
        return tuple(sorted(set.intersection(*sets))) if sets else ()

    def figure(self, trial: TrialRecord, metric: str, slo: Slo | None = None) -> str:
        """`metric` of a candidate, such as `123 \u00b14%`, or `123 \u00d7/\u00f72.5` where the interval is that wide.

        `~` says that the interval is from the noise of the study, `?` that it reaches beyond `slo`.
        """
        metrics = trial.measurement.metrics.flat() if trial.measurement else {}
        if metric not in metrics:
            return "-"
        text, interval = number(metrics[metric]), self.interval(trial, metric)
        if interval is None or interval.mean == 0 or interval.high / interval.mean - 1 < _CERTAIN:
            return text
        about = "~" if interval.basis is Basis.STUDY_NOISE else ""
        doubt = "?" if slo is not None and _reaches_beyond(interval, slo) else ""
        share = interval.high / interval.mean - 1
        width = f"\u00b1{about}{_percent(share)}" if share <= 1 else f"\u00d7/\u00f7{about}{number(1 + share)}"
        return f"{text} {width}{doubt}"

    def highest_rate(self, trial: TrialRecord) -> tuple[float | None, float | None] | None:
        """The interval that holds the highest rates of all runs of a candidate, None where none was searched.

        Its ends are None where a run met even the upper end of the search, or missed its lower one.
        """
        found = self.runs_of(trial)
        ends = (
            [t.measurement.highest_rate for t in found.measured if t.measurement and t.measurement.probes]
            if found
            else []
        )
        if not ends:
            return None
        met, missed = [low for low, _ in ends], [high for _, high in ends]
        low = None if None in met else min(rate for rate in met if rate is not None)
        return low, None if None in missed else max(rate for rate in missed if rate is not None)

    def intervals_json(self, trial: TrialRecord, metrics: Iterable[str]) -> dict[str, Json]:
        """The intervals of `metrics` by name; null where nothing says how much a metric varies."""
        found = {metric: self.interval(trial, metric) for metric in metrics}
        return {name: {**asdict(i), "basis": str(i.basis), "level": LEVEL} if i else None for name, i in found.items()}

    @property
    def legend(self) -> str:
        """What the marks of a table mean; what is missing, where nothing was repeated."""
        if not self.stability.noise:
            return (
                "Nothing was measured twice, so that nobody knows how much of the differences is noise "
                "(budget.confirm and budget.control_every say what is repeated)."
            )
        return (
            f"\u00b1: {LEVEL:.0%} interval of the mean over a candidate's runs; \u00b1~: from the noise of the study, "
            f"where it has fewer than {OWN_RUNS} runs. ?: the interval reaches beyond the SLO. "
            "Ties differ in no objective by more than the noise."
        )


def _reaches_beyond(interval: Interval, slo: Slo) -> bool:
    worst = interval.high if METRICS[slo.metric].direction is Direction.MINIMIZE else interval.low
    return slo.violation(worst) > 0


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def stability_table(stability: Stability, metrics: Sequence[str]) -> RenderableType:
    """Noise and drift of `metrics`; says what is missing where nothing was repeated."""
    known = [metric for metric in metrics if metric in stability.noise]
    if not known:
        return Text("Noise and drift are not known: nothing was measured twice yet.")
    table = Table(title="Noise and drift", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("metric", "noise", "degrees of freedom", "drift of the control", "95% interval", ""):
        table.add_column(heading, justify="left" if heading in ("metric", "") else "right", overflow="fold")
    for metric in known:
        noise, drift = stability.noise[metric], stability.drift.get(metric)
        table.add_row(metric, _percent(noise.log_stddev), str(noise.degrees), *_drift_cells(drift))
    return Group(table, Text(_control_text(stability)))


def _drift_cells(drift: Drift | None) -> tuple[str, str, str]:
    if drift is None:
        return "-", "-", ""
    interval = f"{drift.low:+.1%}\nto {drift.high:+.1%}"
    return f"{drift.change:+.1%}", interval, "drifts" if drift.is_clear else "no clear drift"


def _control_text(stability: Stability) -> str:
    if stability.control is None:
        return f"{stability.repeats} repeats, none of them a control."
    hours = max((drift.hours for drift in stability.drift.values()), default=None)
    over = f" over {duration(hours * 3600)}" if hours is not None else "; its drift is known from the third run on"
    return (
        f"Noise is the standard deviation between runs of one candidate. The control, trial {stability.control}, "
        f"was measured {stability.control_runs} times{over}; {stability.repeats} repeats in all."
    )


def stability_json(stability: Stability) -> dict[str, Json]:
    """Noise and drift for programs."""
    return {
        "noise": {metric: {**asdict(noise)} for metric, noise in stability.noise.items()},
        "drift": {metric: {**asdict(d), "clear": d.is_clear} for metric, d in stability.drift.items()},
        "control": stability.control,
        "control_runs": stability.control_runs,
        "repeats": stability.repeats,
    }
