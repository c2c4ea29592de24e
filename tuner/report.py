"""What a study found, for people and for programs: the front as a table, as JSON and as CSV; a study at a glance."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from search_spaces.metrics import METRICS, Direction
from search_spaces.outcome import Failure, Measurement
from search_spaces.problem import Problem
from studies.codec import Json, to_json
from studies.device_use import DeviceUse
from studies.history import StudySummary
from studies.noise import stability_of
from studies.pareto import front
from studies.records import TrialRecord, TrialStatus
from studies.repeats import candidates_of, runs_by_key
from studies.spending import spent
from tuner.spread import Spreads, stability_json, stability_table
from tuner.wording import candidate_json, candidate_text, metric_label, number, rate_text, repeats_text, slo_text

Z_90 = 1.6449
"""Standard deviations on either side of a normal mean that hold 90%."""


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """A study as it stands: its name, question and trials, whether it can still go on (`status`), and its storage.

    `trials` holds every run; what is compared are candidates, each with the means of its runs. `earlier` are the
    earlier studies that taught it or gave it seeds, in words. `device_use` is that of all its runs. `study_file` is the
    resolved study file that it was made with, without the storage; empty where it is not known.
    """

    name: str
    status: str
    problem: Problem
    trials: tuple[TrialRecord, ...]
    storage: str
    earlier: tuple[str, ...] = ()
    device_use: DeviceUse = field(default_factory=DeviceUse)
    study_file: str = ""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Metrics of the objectives, in order."""
        return tuple(objective.metric for objective in self.problem.objectives)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Better direction of each objective."""
        return tuple(objective.direction for objective in self.problem.objectives)

    @cached_property
    def candidates(self) -> tuple[TrialRecord, ...]:
        """Every candidate once, with the means of its runs (`studies.repeats.candidates_of`)."""
        return candidates_of(self.trials)

    @cached_property
    def spreads(self) -> Spreads:
        """How sure the figures are, as far as repeats tell it."""
        return Spreads(runs=runs_by_key(self.trials), stability=stability_of(self.trials, METRICS))

    @property
    def measured(self) -> tuple[TrialRecord, ...]:
        """The measured candidates, with the means of their runs."""
        return tuple(trial for trial in self.candidates if trial.status is TrialStatus.MEASURED)

    @property
    def first_runs(self) -> tuple[TrialRecord, ...]:
        """The measured trials without the repeats: what predictions are held against, which knew nothing of them."""
        return tuple(t for t in self.trials if t.status is TrialStatus.MEASURED and not t.is_repeat)

    @property
    def repeats(self) -> int:
        """Finished repeats."""
        return sum(trial.is_repeat and trial.is_finished for trial in self.trials)

    @cached_property
    def front(self) -> tuple[TrialRecord, ...]:
        """The feasible candidates that no other dominates, best first in the first objective."""
        return front(self.trials, self.directions)

    @property
    def emulated(self) -> bool:
        """True where a figure was not measured on the hardware that the study names."""
        return any(trial.measurement is not None and trial.measurement.emulated for trial in self.measured)

    def count(self, status: TrialStatus) -> int:
        """Number of trials in `status`, repeats left out."""
        return sum(trial.status is status and not trial.is_repeat for trial in self.trials)


def metrics_of(trial: TrialRecord) -> dict[str, float]:
    """Every metric of a measured trial or candidate; empty for another."""
    return trial.measurement.metrics.flat() if trial.measurement else {}


def best(report: StudyReport) -> dict[str, TrialRecord]:
    """The best feasible trial of each objective; empty while there is none."""
    feasible = [trial for trial in report.candidates if trial.feasible]
    if not feasible:
        return {}
    return {
        metric: _best_of(feasible, metric, direction)
        for metric, direction in zip(report.objectives, report.directions, strict=True)
    }


def _best_of(trials: Sequence[TrialRecord], metric: str, direction: Direction) -> TrialRecord:
    sign = 1.0 if direction is Direction.MINIMIZE else -1.0
    return min(trials, key=lambda trial: sign * metrics_of(trial)[metric])


def relative_error(trial: TrialRecord, metric: str) -> float | None:
    """|predicted - measured| / measured of `metric`; None without a prediction or a measurement above 0."""
    measured = metrics_of(trial).get(metric, 0.0)
    predicted = trial.prediction.metrics.get(metric) if trial.prediction else None
    return abs(predicted - measured) / measured if predicted is not None and measured > 0 else None


def median_error(trials: Sequence[TrialRecord], metric: str) -> float | None:
    """Median relative error of the predictions made before measuring; None where there are none."""
    errors = [error for trial in trials if (error := relative_error(trial, metric)) is not None]
    return statistics.median(errors) if errors else None


def coverage(trials: Sequence[TrialRecord], metric: str) -> float | None:
    """Share of measurements inside the 90% interval that was predicted before; None where no interval was given."""
    inside = [held for trial in trials if (held := _in_interval(trial, metric)) is not None]
    return sum(inside) / len(inside) if inside else None


def _in_interval(trial: TrialRecord, metric: str) -> bool | None:
    measured = metrics_of(trial).get(metric, 0.0)
    predicted = trial.prediction.metrics.get(metric, 0.0) if trial.prediction else 0.0
    spread = trial.prediction.log_stddev.get(metric) if trial.prediction else None
    if spread is None or measured <= 0 or predicted <= 0:
        return None
    return abs(math.log(measured / predicted)) <= Z_90 * spread


def error_metrics(report: StudyReport) -> tuple[str, ...]:
    """The metrics whose prediction error is shown: objectives and SLOs, then the two basic latencies."""
    names = (*report.objectives, *(slo.metric for slo in report.problem.slos), "ttft_p50_ms", "tpot_p50_ms")
    return tuple(dict.fromkeys(names))


def front_table(report: StudyReport) -> RenderableType:
    """The front: figures as a table, then each configuration; says what is missing where there is no front."""
    if not report.front:
        return Text(no_front_text(report))
    counts = f"{len(report.front)} of {len(report.measured)} measured trials"
    title = Text(f"Pareto front of {report.name}{mark(report)}: {counts}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("trial", justify="right")
    width = 11 if report.repeats else 16
    for metric in report.objectives:
        table.add_column(metric_heading(metric, width), justify="right", style="bold", overflow="fold")
    for metric in _other_slos(report):
        table.add_column(f"{metric_heading(metric, width)} SLO", justify="right", overflow="fold")
    if report.problem.workload.rate_search is not None:
        table.add_column("highest\nrate", justify="right")
    if report.repeats:
        table.add_column("runs", justify="right")
        table.add_column("ties\nwith", overflow="fold")
    for trial in report.front:
        cells = (*_figures(report, trial), *_rate_cells(report, trial), *_repeat_cells(report, trial))
        table.add_row(str(trial.number), *cells)
    heading = Text("Configurations (options that are off the engine's default):")
    return Group(title, table, Text(f"{report.spreads.legend}\n"), heading, *_configs(report))


def _figures(report: StudyReport, trial: TrialRecord) -> list[str]:
    slos = {slo.metric: slo for slo in report.problem.slos}
    metrics = (*report.objectives, *_other_slos(report))
    return [report.spreads.figure(trial, metric, slos.get(metric)).replace(" ", "\n") for metric in metrics]


def _rate_cells(report: StudyReport, trial: TrialRecord) -> tuple[str, ...]:
    """The interval of the highest rate, where it was searched."""
    if report.problem.workload.rate_search is None:
        return ()
    found = report.spreads.highest_rate(trial)
    return (rate_text(*found).replace(" to ", "\nto ") if found else "-",)


def _repeat_cells(report: StudyReport, trial: TrialRecord) -> tuple[str, ...]:
    """Runs and ties of a member of the front, where anything was repeated."""
    if not report.repeats:
        return ()
    return str(report.spreads.count(trial)), ", ".join(map(str, ties(report, trial)))


def ties(report: StudyReport, trial: TrialRecord) -> tuple[int, ...]:
    """The other members of the front that differ from `trial` in no objective by more than the noise."""
    return report.spreads.ties(trial, report.front, report.objectives)


def mark(report: StudyReport) -> str:
    """What every title says of figures that no hardware gave; empty for measured ones."""
    return " (EMULATED: not measured on the hardware that it names)" if report.emulated else ""


def metric_heading(metric: str, width: int = 11) -> str:
    """Name of `metric`, broken at underscores into lines of about `width`, then its unit and better direction."""
    lines = [""]
    for part in metric.split("_"):
        joined = f"{lines[-1]}_{part}" if lines[-1] else part
        if len(joined) > width:
            lines[-1] += "_"
            lines.append(part)
        else:
            lines[-1] = joined
    info = METRICS[metric]
    arrow = "\u2193" if info.direction is Direction.MINIMIZE else "\u2191"
    return "\n".join([*lines, f"{info.unit} {arrow}"])


def _other_slos(report: StudyReport) -> tuple[str, ...]:
    return tuple(slo.metric for slo in report.problem.slos if slo.metric not in report.objectives)


def _configs(report: StudyReport) -> list[Text]:
    return [
        Text(f"  {trial.number:>5}  {configuration_text(report, trial)}") for trial in report.front if trial.candidate
    ]


def configuration_text(report: StudyReport, trial: TrialRecord) -> str:
    """Mode, pools and load of a candidate in a line; a load that was searched is no given one."""
    if trial.candidate is None:
        return "?"
    text = candidate_text(trial.candidate)
    if report.problem.workload.rate_search is None:
        return text
    return f"{text.removesuffix(str(trial.candidate.load))}its highest rate"


def no_front_text(report: StudyReport) -> str:
    """Why a study has no front: nothing was measured, or nothing meets every SLO, and what the nearest misses."""
    if not report.measured:
        return f"{report.name} has no measured trial yet; see: tuner study show {report.name}"
    nearest = min(report.measured, key=lambda trial: sum(max(0.0, v) for v in trial.violations.values()))
    missed = ", ".join(
        f"{slo.metric}={number(metrics_of(nearest)[slo.metric])} (SLO {number(slo.threshold)})"
        for slo in report.problem.slos
        if nearest.violations.get(slo.metric, 0.0) > 0
    )
    configuration = configuration_text(report, nearest)
    return (
        f"No configuration of {report.name}{mark(report)} meets every SLO. "
        f"Nearest is trial {nearest.number}: {missed}\n"
        f"  {configuration}\nAsk for less, allow more nodes or widen the search space."
    )


def show(report: StudyReport) -> RenderableType:
    """A study at a glance."""
    return Group(*_head(report), _best_table(report), _failures(report), _errors(report), _stability(report))


def _stability(report: StudyReport) -> RenderableType:
    return stability_table(report.spreads.stability, error_metrics(report))


def _head(report: StudyReport) -> list[RenderableType]:
    found = [f"{report.count(status)} {status}" for status in TrialStatus if report.count(status)]
    counts = ", ".join([*found, *([repeats_text(report.repeats)] if report.repeats else [])])
    slos = ", ".join(slo_text(slo) for slo in report.problem.slos)
    return [
        Text(f"{report.name}{mark(report)}: {report.status}", style="bold"),
        Text(f"  trials      {counts or 'none'}"),
        Text(f"  feasible    {sum(t.feasible for t in report.candidates)} ({len(report.front)} on the front)"),
        Text(f"  SLOs        {slos or 'none'}"),
        Text(f"  spent       {spent_text(report)}"),
        *([Text(f"  devices     {report.device_use}")] if report.device_use.device_s > 0 else []),
        Text(f"  storage     {report.storage}"),
        *(Text(f"  learnt from {study}") for study in report.earlier),
    ]


def spent_text(report: StudyReport) -> str:
    """Device-hours and dollars of all trials so far, and what they leave out."""
    total = spent(report.trials, report.problem)
    priced = any(pool.price_per_hour > 0 for pool in report.problem.node_pools)
    money = f", ${total.dollars:,.2f}" if priced else ", without prices"
    return f"{number(total.device_hours)} device-hours{money} in {total.trials} trials (idle and warm nodes left out)"


def _best_table(report: StudyReport) -> RenderableType:
    table = Table(title="Best feasible trial per objective", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("objective", "value", "trial", "configuration"):
        table.add_column(heading, overflow="fold")
    for metric, trial in best(report).items():
        text = configuration_text(report, trial)
        same = report.spreads.tied(trial, [t for t in report.candidates if t.feasible], metric)
        numbers = f"{trial.number} (ties with {', '.join(map(str, same))})" if same else str(trial.number)
        table.add_row(metric_label(metric), report.spreads.figure(trial, metric), numbers, Text(text))
    return table if table.row_count else Text("\nNo trial meets every SLO yet.")


def _failures(report: StudyReport) -> RenderableType:
    failed = [(trial, trial.failure) for trial in report.trials if trial.failure is not None]
    if not failed:
        return Text("\nNo failures.\n")
    table = Table(title="Failures", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("reason", "trial", "what happened, and the engine's last lines"):
        table.add_column(heading, overflow="fold")
    for trial, failure in sorted(failed, key=lambda pair: (pair[1].reason, pair[0].number)):
        table.add_row(str(failure.reason), str(trial.number), Text(_failure_text(failure)))
    return table


def _failure_text(failure: Failure, lines: int = 3) -> str:
    tail = failure.log_tail.strip().splitlines()[-lines:]
    return "\n".join([failure.detail, *(f"| {line}" for line in tail)])


def _errors(report: StudyReport) -> RenderableType:
    table = Table(title="Predicted before measuring, against measured", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")
    table.add_column("median error", justify="right")
    table.add_column("last half", justify="right")
    table.add_column("in 90% interval", justify="right")
    table.add_column("trials", justify="right")
    for metric in error_metrics(report):
        known = [trial for trial in report.first_runs if relative_error(trial, metric) is not None]
        if known:
            overall, late = median_error(known, metric), median_error(known[len(known) // 2 :], metric)
            inside = coverage(known, metric)
            held = "-" if inside is None else f"{inside:.0%}"
            table.add_row(metric, f"{overall:.0%}", f"{late:.0%}", held, str(len(known)))
    return table if table.row_count else Text("No predictions were made before measuring.")


def trial_json(trial: TrialRecord, report: StudyReport) -> dict[str, Json]:
    """A run for programs: configuration, objectives, every metric, prediction, violations and provenance."""
    measurement = trial.measurement
    metrics = metrics_of(trial)
    failure = trial.failure
    return {
        "trial": trial.number,
        "status": str(trial.status),
        "feasible": trial.feasible,
        "origin": str(trial.origin) if trial.origin else None,
        "repeat_of": trial.repeat_of,
        "key": trial.key,
        "configuration": candidate_json(trial.candidate) if trial.candidate else None,
        "objectives": {name: metrics.get(name) for name in report.objectives},
        "metrics": dict(metrics),
        "predicted": dict(trial.prediction.metrics) if trial.prediction else None,
        "violations": dict(trial.violations),
        "requests": measurement.metrics.requests if measurement else None,
        "errors": measurement.metrics.errors if measurement else None,
        "highest_rate": _rate_json(measurement),
        "client_lateness_ms": measurement.client_lateness_ms if measurement else None,
        "timings_s": dict(trial.outcome.timings_s) if trial.outcome else {},
        "environment": dict(trial.outcome.environment) if trial.outcome else {},
        "emulated": measurement.emulated if measurement else None,
        "failure": {"reason": str(failure.reason), "detail": failure.detail, "log_tail": failure.log_tail}
        if failure
        else None,
        "artifacts": dict(trial.artifact_ids),
        "started_at": trial.started_at.isoformat() if trial.started_at else None,
        "ended_at": trial.ended_at.isoformat() if trial.ended_at else None,
    }


def _rate_json(measurement: Measurement | None) -> Json:
    """What a search for the highest rate ran, and its interval; null where none was made."""
    if measurement is None or not measurement.probes:
        return None
    met, missed = measurement.highest_rate
    return {"met": met, "missed": missed, "probes": to_json(measurement.probes)}


def member_json(trial: TrialRecord, report: StudyReport) -> dict[str, Json]:
    """A candidate for programs: `trial_json` with the means of its runs, their intervals, and what it ties with."""
    found = report.spreads.runs_of(trial)
    return trial_json(trial, report) | {
        "runs": [run.number for run in found.finished] if found else [],
        "intervals": report.spreads.intervals_json(trial, metrics_of(trial)),
        "ties_with": list(ties(report, trial)),
    }


def front_json(report: StudyReport) -> dict[str, Json]:
    """The front and how it was found."""
    return _overview(report) | {"front": [member_json(trial, report) for trial in report.front]}


def show_json(report: StudyReport) -> dict[str, Json]:
    """The study with every trial."""
    errors: dict[str, Json] = {metric: median_error(report.first_runs, metric) for metric in error_metrics(report)}
    covered: dict[str, Json] = {metric: coverage(report.first_runs, metric) for metric in error_metrics(report)}
    return _overview(report) | {
        "best": {metric: trial.number for metric, trial in best(report).items()},
        "stability": stability_json(report.spreads.stability),
        "prediction_error": errors,
        "interval_coverage": covered,
        "front": [trial.number for trial in report.front],
        "trials": [trial_json(trial, report) for trial in report.trials],
    }


def _overview(report: StudyReport) -> dict[str, Json]:
    counts: dict[str, Json] = {str(status): report.count(status) for status in TrialStatus}
    modes = [str(trial.candidate.config.mode) for trial in report.measured if trial.candidate]
    return {
        "study": report.name,
        "status": report.status,
        "emulated": report.emulated,
        "storage": report.storage,
        "earlier_studies": list(report.earlier),
        "objectives": [
            {"metric": name, "direction": str(direction), "unit": METRICS[name].unit}
            for name, direction in zip(report.objectives, report.directions, strict=True)
        ],
        "slos": [to_json(slo) for slo in report.problem.slos],
        "spent": to_json(spent(report.trials, report.problem)),
        "device_use": to_json(report.device_use),
        "counts": counts | {"repeats": report.repeats},
        "measured_modes": {mode: modes.count(mode) for mode in sorted(set(modes))},
    }


def front_csv(report: StudyReport) -> str:
    """The front as CSV: one row a trial, a column for each setting and metric."""
    rows = [{**_csv_row(trial), **_interval_columns(report, trial)} for trial in report.front]
    columns = list(dict.fromkeys(column for row in rows for column in row)) or ["trial"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(trial: TrialRecord) -> Mapping[str, object]:
    row: dict[str, object] = {"trial": trial.number}
    if trial.candidate is not None:
        config, load = trial.candidate.config, trial.candidate.load
        row |= {"engine": config.engine, "mode": config.mode, load.arrival.load_unit: load.value}
        for pool in config.pools:
            settings: dict[str, object] = {"node_pool": pool.node_pool, "replicas": pool.replicas}
            settings |= asdict(pool.parallelism) | dict(pool.options)
            row |= {f"{pool.role}.{name}": value for name, value in settings.items()}
    emulated = trial.measurement is not None and trial.measurement.emulated
    return row | metrics_of(trial) | {"emulated": emulated}


def _interval_columns(report: StudyReport, trial: TrialRecord) -> Mapping[str, object]:
    """Runs, and both ends of the interval of each objective; empty where nothing says how much it varies."""
    columns: dict[str, object] = {"runs": report.spreads.count(trial)}
    for metric in report.objectives:
        found = report.spreads.interval(trial, metric)
        columns[f"{metric}_low"], columns[f"{metric}_high"] = (found.low, found.high) if found else ("", "")
    return columns


def summaries_table(summaries: Sequence[StudySummary]) -> RenderableType:
    """All studies of a storage."""
    if not summaries:
        return Text("The storage holds no study yet; run one with: tuner study run FILE")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("study", "objectives", "measured", "failed", "lost", "open", "begun"):
        table.add_column(heading, overflow="fold")
    for found in summaries:
        counts = [str(count) for count in (found.measured, found.failed, found.lost, found.open)]
        begun = found.started_at.strftime("%Y-%m-%d %H:%M") if found.started_at else ""
        table.add_row(found.name, ", ".join(found.objectives), *counts, begun)
    return table


def summaries_json(summaries: Sequence[StudySummary]) -> Json:
    """All studies of a storage, for programs."""
    return [
        {
            "study": found.name,
            "objectives": list(found.objectives),
            "measured": found.measured,
            "failed": found.failed,
            "lost": found.lost,
            "open": found.open,
            "started_at": found.started_at.isoformat() if found.started_at else None,
        }
        for found in summaries
    ]
