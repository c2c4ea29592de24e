"""The report as Markdown: what fits in a pull request or a mail."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.report import StudyReport, configuration_text, error_metrics
from tuner.report_story import Story, story_of
from tuner.wording import metric_label


def report_markdown(report: StudyReport) -> str:
    """Question, answer, front, comparison, predictions, importance, failures, cost and commands."""
    story = story_of(report)
    parts = [
        f"# {story.title}",
        story.answer,
        "## Question",
        _list(story.question),
        "## Front",
        _front(report) or "No configuration meets every SLO.",
        report.spreads.legend,
        *_recommended(story),
        "## Predicted before measuring, against measured",
        _table(
            ("metric", "median error", "last half", "in 90% interval", "trials"),
            [(e.metric, e.median, e.late, e.inside, str(e.trials)) for e in story.errors],
        )
        or "No predictions were made before measuring.",
        "## What mattered",
        *_importance(story),
        "## Noise",
        _noise(report),
        "## Failures",
        _failures(story),
        "## Cost",
        _list(story.cost),
        "## How to repeat it",
        *(f"{purpose}:\n\n```\n{command}\n```" for purpose, command in story.commands),
        *((f"Study file:\n\n```yaml\n{report.study_file.strip()}\n```",) if report.study_file else ()),
    ]
    return "\n\n".join(parts) + "\n"


def _recommended(story: Story) -> list[str]:
    if story.recommended is None:
        return []
    rows = [(c.metric, c.recommended, c.default, c.change) for c in story.compared]
    table = _table(("metric", "recommended", "default", "change"), rows)
    heading = f"## Recommended: trial {story.recommended.number}"
    return [heading, f"`{story.configuration}`", story.why, story.default_note, *([table] if table else [])]


def _front(report: StudyReport) -> str:
    headings = ("trial", *(metric_label(metric) for metric in report.objectives), "runs", "configuration")
    rows = [
        (
            str(trial.number),
            *(report.spreads.figure(trial, metric) for metric in report.objectives),
            str(report.spreads.count(trial)),
            configuration_text(report, trial),
        )
        for trial in report.front
    ]
    return _table(headings, rows)


def _importance(story: Story) -> list[str]:
    found = [(metric, shares) for metric, shares in story.importance if shares]
    if not found:
        return ["Too few candidates were measured to tell."]
    rows = [(metric, ", ".join(f"{i.setting} {i.share:.0%}" for i in shares[:4])) for metric, shares in found]
    return [_table(("objective", "share of the variance that goes with a setting, each alone"), rows)]


def _noise(report: StudyReport) -> str:
    noise = report.spreads.stability.noise
    rows = [(m, f"{noise[m].log_stddev:.1%}", str(noise[m].degrees)) for m in error_metrics(report) if m in noise]
    return _table(("metric", "noise", "degrees of freedom"), rows) or "Not known: nothing was measured twice."


def _failures(story: Story) -> str:
    if not story.failures:
        return "None."
    rows = [(g.reason, str(len(g.trials)), f"trial {g.example}: {g.detail}") for g in story.failures]
    return _table(("reason", "trials", "example"), rows)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; empty without rows. Bars and line ends in cells are made harmless."""
    if not rows:
        return ""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
