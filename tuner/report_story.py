"""A study told to someone who was not there: question, answer, comparison, failures, cost and how to repeat it.

Everything here is data and plain sentences; `report_html`, `report_markdown` and `report_cli` only set it.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import asdict, dataclass

from search_spaces.metrics import METRICS, Direction
from search_spaces.problem import Problem
from studies.codec import Json
from studies.records import Origin, TrialRecord
from tuner.report import (
    StudyReport,
    configuration_text,
    coverage,
    error_metrics,
    mark,
    median_error,
    metrics_of,
    no_front_text,
    relative_error,
    show_json,
    spent_text,
)
from tuner.report_importance import Importance, importances
from tuner.spread import stability_json
from tuner.wording import metric_label, number, slo_text

_COMPARED = (
    "output_tokens_per_s_per_gpu",
    "output_tokens_per_s_per_user",
    "ttft_p50_ms",
    "tpot_p50_ms",
    "cost_per_million_output_tokens",
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric of the recommended configuration beside that of the default; `change` in words."""

    metric: str
    recommended: str
    default: str
    change: str
    better: bool | None


@dataclass(frozen=True, kw_only=True)
class FailureGroup:
    """Failures of one reason: all their trials, and one of them as an example."""

    reason: str
    trials: tuple[int, ...]
    example: int
    detail: str
    log_tail: str


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """How far predictions made before measuring were from the first runs of a metric, in words."""

    metric: str
    median: str
    late: str
    inside: str
    trials: int


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a report says. `recommended` is None where nothing meets every SLO; `default` where none was measured."""

    title: str
    question: tuple[str, ...]
    answer: str
    recommended: TrialRecord | None
    configuration: str
    why: str
    default: TrialRecord | None
    default_configuration: str
    default_note: str
    compared: tuple[Compared, ...]
    errors: tuple[PredictionError, ...]
    importance: tuple[tuple[str, tuple[Importance, ...]], ...]
    failures: tuple[FailureGroup, ...]
    cost: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]


def story_of(report: StudyReport) -> Story:
    """Everything that a report says in words and tables."""
    recommended = report.front[0] if report.front else None
    default = _default(report)
    text = configuration_text(report, recommended) if recommended else ""
    return Story(
        title=f"{report.name}{mark(report)}",
        question=_question(report),
        answer=_answer(report, recommended, default),
        recommended=recommended,
        configuration=text,
        why=_why(report),
        default=default,
        default_configuration=configuration_text(report, default) if default else "",
        default_note=_default_note(report, recommended, default),
        compared=_comparison(report, recommended, default),
        errors=_errors(report),
        importance=tuple((metric, importances(report.measured, metric)[:8]) for metric in report.objectives),
        failures=_failures(report),
        cost=_cost(report),
        commands=_commands(report, recommended),
        environment=_environment(recommended),
    )


def _question(report: StudyReport) -> tuple[str, ...]:
    problem = report.problem
    objectives = ", ".join(metric_label(metric) for metric in report.objectives)
    slos = ", ".join(map(slo_text, problem.slos)) or "none"
    return (
        f"How is {problem.model.name} best served on {_hardware(problem)}?",
        f"Requests: {_workload(problem)}.",
        f"Best means: {objectives}.",
        f"SLOs: {slos}.",
    )


def _hardware(problem: Problem) -> str:
    pools = [f"{p.nodes} x {p.devices_per_node} {p.device.name} ({p.name})" for p in problem.node_pools]
    return " and ".join(pools)


def _workload(problem: Problem) -> str:
    workload = problem.workload
    kind = "a trace of" if workload.trace else "conversations of" if workload.conversation else ""
    lengths = f"{kind} {workload.isl.mean:,} prompt tokens and {workload.osl.mean:,} output tokens in the mean".strip()
    shared = f", {workload.shared_prefix:.0%} of the prompt shared" if workload.shared_prefix else ""
    searched = ", the highest rate that meets every SLO" if workload.rate_search else ""
    return f"{lengths}{shared}, {workload.arrival} arrivals{searched}"


def _answer(report: StudyReport, recommended: TrialRecord | None, default: TrialRecord | None) -> str:
    if recommended is None:
        return no_front_text(report).splitlines()[0]
    first = report.objectives[0]
    figure = report.spreads.figure(recommended, first)
    slos = " and meets every SLO" if report.problem.slos else ""
    versus = _versus(recommended, default, first) if default is not None else ""
    kind = recommended.candidate.config.mode if recommended.candidate else "?"
    marked = " These figures are emulated: no hardware gave them." if report.emulated else ""
    return (
        f"Trial {recommended.number}, {kind} on {_devices(recommended)}, reaches {figure} {METRICS[first].unit} "
        f"({first}){slos}{versus}.{marked}"
    )


def _devices(trial: TrialRecord) -> str:
    count = trial.candidate.config.devices if trial.candidate else 0
    return f"{count} device" if count == 1 else f"{count} devices"


def _versus(trial: TrialRecord, default: TrialRecord, metric: str) -> str:
    mine, theirs = metrics_of(trial).get(metric, 0.0), metrics_of(default).get(metric, 0.0)
    if trial.number == default.number:
        return "; it is the engine's default"
    if mine <= 0 or theirs <= 0:
        return ""
    return f", {number(mine / theirs)} times the engine's default ({number(theirs)})"


def _why(report: StudyReport) -> str:
    if not report.front:
        return ""
    others = len(report.front) - 1
    trade = f"; {others} others of the front trade it for another objective" if others else ""
    return f"Recommended is the member of the front that is best in {report.objectives[0]}, the first objective{trade}."


def _default(report: StudyReport) -> TrialRecord | None:
    """The first default configuration that was measured; one of the recommended engine and mode before others."""
    found = [trial for trial in report.measured if trial.origin is Origin.DEFAULT]
    best = report.front[0].candidate if report.front else None
    if best is None:
        return found[0] if found else None
    ranked = sorted(found, key=lambda t: (_unlike(t, best.config.engine, str(best.config.mode)), t.number))
    return ranked[0] if ranked else None


def _unlike(trial: TrialRecord, engine: str, mode: str) -> int:
    config = trial.candidate.config if trial.candidate else None
    return 3 if config is None else 2 * (config.engine != engine) + (str(config.mode) != mode)


def _default_note(report: StudyReport, recommended: TrialRecord | None, default: TrialRecord | None) -> str:
    if recommended is None:
        return "There is nothing to compare: no configuration meets every SLO."
    if default is None:
        return f"No default configuration of {report.name} could be measured, so there is nothing to compare with."
    if default.number == recommended.number:
        return "The engine's default is itself the recommended configuration."
    missed = "" if default.feasible else " It misses an SLO."
    return f"Default: trial {default.number}.{missed}{_failed_defaults(report)}"


def _failed_defaults(report: StudyReport) -> str:
    """Defaults of other modes or engines that did not hold: the one that is compared with may be none of those."""
    failed = [
        f"trial {trial.number} ({trial.candidate.config.mode}): {trial.failure.reason}"
        for trial in report.candidates
        if trial.origin is Origin.DEFAULT and trial.candidate and trial.failure is not None
    ]
    return f" Defaults that failed: {', '.join(failed)}." if failed else ""


def _comparison(
    report: StudyReport, recommended: TrialRecord | None, default: TrialRecord | None
) -> tuple[Compared, ...]:
    if recommended is None or default is None or recommended.number == default.number:
        return ()
    names = dict.fromkeys((*report.objectives, *(slo.metric for slo in report.problem.slos), *_COMPARED))
    return tuple(
        _compared(report, recommended, default, name)
        for name in names
        if name in metrics_of(recommended) and name in metrics_of(default)
    )


def _compared(report: StudyReport, one: TrialRecord, other: TrialRecord, metric: str) -> Compared:
    mine, theirs = metrics_of(one)[metric], metrics_of(other)[metric]
    tied = other.number in report.spreads.tied(one, [other], metric)
    lower = METRICS[metric].direction is Direction.MINIMIZE
    change = "within the noise" if tied else f"{mine / theirs - 1:+.0%}" if theirs > 0 else "-"
    better = None if tied or mine == theirs else (mine < theirs) == lower
    figures = (report.spreads.figure(trial, metric) for trial in (one, other))
    return Compared(
        metric=metric, **dict(zip(("recommended", "default"), figures, strict=True)), change=change, better=better
    )


def _errors(report: StudyReport) -> tuple[PredictionError, ...]:
    found = []
    for metric in error_metrics(report):
        known = [trial for trial in report.first_runs if relative_error(trial, metric) is not None]
        if known:
            inside = coverage(known, metric)
            found.append(
                PredictionError(
                    metric=metric,
                    median=_share(median_error(known, metric)),
                    late=_share(median_error(known[len(known) // 2 :], metric)),
                    inside=_share(inside),
                    trials=len(known),
                )
            )
    return tuple(found)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _failures(report: StudyReport) -> tuple[FailureGroup, ...]:
    groups: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in report.trials:
        if trial.failure is not None:
            groups[str(trial.failure.reason)].append(trial)
    found = []
    for reason, trials in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        example = max(trials, key=lambda t: len(t.failure.log_tail) if t.failure else 0)
        if example.failure is not None:
            tail = "\n".join(example.failure.log_tail.strip().splitlines()[-12:])
            numbers = tuple(trial.number for trial in trials)
            detail = example.failure.detail
            found.append(
                FailureGroup(reason=reason, trials=numbers, example=example.number, detail=detail, log_tail=tail)
            )
    return tuple(found)


def _cost(report: StudyReport) -> tuple[str, ...]:
    use = (str(report.device_use),) if report.device_use.device_s > 0 else ()
    return (spent_text(report), *use, *(f"learnt from {study}" for study in report.earlier))


def _commands(report: StudyReport, recommended: TrialRecord | None) -> tuple[tuple[str, str], ...]:
    name = shlex.quote(report.name)
    again = (
        ("ask the same question again (save the study file below)", "tuner study run study.yaml"),
        ("look at every trial", f"tuner study show {name}"),
        ("open the storage in the browser", "tuner dashboard"),
    )
    if recommended is None:
        return again
    folder = f"deploy-{report.name}-{recommended.number}"
    out = shlex.quote(folder)
    deploy = f"tuner deploy {name} --trial {recommended.number} --target shell --out {out}"
    bench = f"tuner bench {shlex.quote(f'{folder}/benchmark.json')} --url http://127.0.0.1:8000"
    first = (("write what starts the recommended configuration", deploy), ("measure it again", bench))
    return (*first, *again)


def _environment(recommended: TrialRecord | None) -> tuple[tuple[str, str], ...]:
    return tuple(recommended.outcome.environment.items()) if recommended and recommended.outcome else ()


def report_json(report: StudyReport) -> dict[str, Json]:
    """The whole report for programs: what `tuner study show --json` says, and the story."""
    story = story_of(report)
    shown = show_json(report)
    return {
        **(shown if isinstance(shown, dict) else {}),
        "question": list(story.question),
        "answer": story.answer,
        "recommended": story.recommended.number if story.recommended else None,
        "default": story.default.number if story.default else None,
        "comparison": [asdict(row) for row in story.compared],
        "importance": {metric: [asdict(i) for i in found] for metric, found in story.importance},
        "failures": [{**asdict(group), "trials": list(group.trials)} for group in story.failures],
        "stability": stability_json(report.spreads.stability),
        "commands": [{"purpose": purpose, "command": command} for purpose, command in story.commands],
    }
