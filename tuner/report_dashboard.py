"""The report's view in optuna-dashboard: what it says of the study and of each trial, and its charts."""

from __future__ import annotations

from dataclasses import replace

from studies.codec import Json
from studies.dashboard_views import Views, save_views
from studies.records import EMULATED_NOTE, TrialRecord
from studies.storage import Storage
from tuner.report import StudyReport, configuration_text, error_metrics, metrics_of
from tuner.report_cloud import NO_CLOUD
from tuner.report_figures import Chart, hypervolume_chart, operating_points, predicted_against_measured
from tuner.report_story import story_of
from tuner.wording import duration, number

_LOG_LINES = 8


def publish(storage: Storage, report: StudyReport) -> None:
    """Write notes and charts of `report` into its study; call it under the study's lease."""
    save_views(storage, report.name, views_of(report))


def views_of(report: StudyReport) -> Views:
    """The summary, a note on every finished or lost trial, and every chart but the cloud of predictions."""
    growth = hypervolume_chart(report)
    charts = [*operating_points(report, NO_CLOUD), *predicted_against_measured(report), *([growth] if growth else [])]
    story = story_of(report)
    marked = f"\n\n**{EMULATED_NOTE}**" if report.emulated else ""
    return Views(
        summary=f"{story.answer}\n\n" + "\n".join(f"- {line}" for line in story.question) + marked,
        notes={trial.number: note_of(report, trial) for trial in report.trials if trial.outcome is not None},
        charts={chart.id: _titled(chart, report).spec for chart in charts},
    )


def _titled(chart: Chart, report: StudyReport) -> Chart:
    """The chart with its title inside, marked where no hardware gave the figures."""
    layout = chart.spec["layout"]
    inside: dict[str, Json] = dict(layout) if isinstance(layout, dict) else {}
    what = "Predicted against measured: " if chart.id.startswith("predicted") else ""
    title = f"{what}{chart.title}{' (EMULATED)' if report.emulated else ''}"
    inside |= {"title": {"text": title}, "margin": {"l": 70, "r": 20, "t": 90, "b": 60}}
    return replace(chart, spec={**chart.spec, "layout": inside})


def note_of(report: StudyReport, trial: TrialRecord) -> str:
    """What was measured of `trial` or why it failed, as Markdown."""
    origin = f", a repeat of trial {trial.repeat_of}" if trial.is_repeat else ""
    head = f"**{trial.status}** ({trial.origin}{origin}): {configuration_text(report, trial)}"
    found = _measured(report, trial) if trial.measurement is not None else _failed(trial)
    phases = ", ".join(
        f"{phase} {duration(s)}" for phase, s in (trial.outcome.timings_s if trial.outcome else {}).items()
    )
    return "\n\n".join([head, *found, *([f"Phases: {phases}."] if phases else [])])


def _measured(report: StudyReport, trial: TrialRecord) -> list[str]:
    metrics = metrics_of(trial)
    predicted = trial.prediction.metrics if trial.prediction else {}
    lines = ["| metric | measured | predicted before |", "|---|---:|---:|"]
    for name in error_metrics(report):
        if name in metrics:
            guess = number(predicted[name]) if name in predicted else "-"
            lines.append(f"| {name} | {number(metrics[name])} | {guess} |")
    missed = ", ".join(f"{name} by {share:.0%}" for name, share in trial.violations.items() if share > 0)
    verdict = f"Misses its limits: {missed}." if missed else "Meets every SLO."
    emulated = [f"**{EMULATED_NOTE}**"] if trial.measurement and trial.measurement.emulated else []
    return ["\n".join(lines), verdict, *emulated]


def _failed(trial: TrialRecord) -> list[str]:
    if trial.failure is None:
        return []
    tail = "\n".join(trial.failure.log_tail.strip().splitlines()[-_LOG_LINES:])
    said = [f"The engine's last lines:\n\n```\n{tail}\n```"] if tail else []
    return [f"Reason: **{trial.failure.reason}**. {trial.failure.detail}", *said]
