"""The story of a campaign: what was asked of every study, what was found, where the budget went, what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from search_spaces.metrics import METRICS
from studies.codec import Json
from studies.history import StudyHistory
from studies.records import TrialRecord
from studies.storage import Storage
from tuner.campaigns.look import View
from tuner.campaigns.record import Slice
from tuner.campaigns.standing import Standing, failures
from tuner.campaigns.status import CampaignStatus, spent_text, status_json
from tuner.report import StudyReport, metrics_of
from tuner.report_story import Story, report_json, story_of
from tuner.stored import make_report
from tuner.wiring import is_emulated
from tuner.wording import number

COMMANDS = (
    ("how it stands", "tuner campaign status {name}"),
    ("go on, with a raised budget", "tuner campaign run FILE --set budget.device_hours=..."),
    ("the whole story of one study", "tuner study report {study}"),
    ("two studies over each other", "tuner study compare {study} OTHER"),
)


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One study: its standing, and its own report and story, None before its first trial."""

    standing: Standing
    report: StudyReport | None
    story: Story | None
    earlier: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.standing.record.study


@dataclass(frozen=True, kw_only=True)
class CampaignStory:
    """A campaign as its report tells it."""

    status: CampaignStatus
    answer: str
    facts: tuple[str, ...]
    chapters: tuple[Chapter, ...]
    commands: tuple[tuple[str, str], ...]

    @property
    def view(self) -> View:
        """The campaign."""
        return self.status.view

    @property
    def emulated(self) -> bool:
        """True where figures are those of a performance model."""
        return any(is_emulated(cell.study) for cell in self.view.campaign.cells)


def story(storage: Storage, status: CampaignStatus) -> CampaignStory:
    """The story of the campaign whose status is `status`."""
    chapters = tuple(_chapter(storage, standing) for standing in status.view.standings)
    name, study = status.view.campaign.name, chapters[0].name
    return CampaignStory(
        status=status,
        answer=_answer(status),
        facts=_facts(status),
        chapters=chapters,
        commands=tuple((what, command.format(name=name, study=study)) for what, command in COMMANDS),
    )


def _chapter(storage: Storage, standing: Standing) -> Chapter:
    if not standing.trials:
        return Chapter(standing=standing, report=None, story=None, earlier=())
    history = StudyHistory(storage, standing.record.study)
    report = make_report(history, standing.cell.study)
    return Chapter(standing=standing, report=report, story=story_of(report), earlier=history.earlier)


def _answer(status: CampaignStatus) -> str:
    """One sentence: how many studies have an answer, what it took, and why it is over."""
    view = status.view
    answered = sum(standing.best is not None for standing in view.standings)
    count = len(view.standings)
    measured = sum(standing.measured for standing in view.standings)
    end = view.memory.ended
    how = f"is over: {end.reason}" if end is not None else f"is {status.state}"
    return (
        f"{answered} of {count} studies have configurations that meet every SLO, found with {measured} measured "
        f"candidates in {spent_text(view)}; the campaign {how}."
    )


def _facts(status: CampaignStatus) -> tuple[str, ...]:
    view = status.view
    dimensions: dict[str, list[str]] = {}
    for cell in view.campaign.cells:
        for dimension, choice in cell.choices.items():
            dimensions.setdefault(dimension, []).append(choice)
    lines = [f"{dimension}: {', '.join(dict.fromkeys(choices))}" for dimension, choices in dimensions.items()]
    if view.deadline is not None:
        lines.append(f"deadline {view.deadline:%Y-%m-%d %H:%M %Z}")
    closed = [standing for standing in view.standings if not standing.is_open]
    lines.append(f"{len(closed)} of {len(view.standings)} studies are closed")
    lines += [f"avoided node {found.host} of pool {found.pool}: {found.why}" for found in view.memory.quarantine]
    return tuple(lines)


def row_of(chapter: Chapter) -> tuple[str, ...]:
    """A study in the table: choices, state, counts, cost, the best value in its first objective, and how."""
    standing = chapter.standing
    best = standing.best
    return (
        chapter.name,
        standing.record.closed or ("open" if standing.begun else "not begun"),
        str(standing.measured),
        str(standing.progress.finished - standing.measured),
        number(standing.total.device_hours),
        str(len(standing.front)),
        "-" if best is None else figure(standing, best),
        chapter.story.configuration if chapter.story is not None and best is not None else "-",
    )


HEADINGS = ("study", "stands", "measured", "failed", "device-hours", "front", "best", "recommended configuration")
FIGURES = (False, False, True, True, True, True, True, False)


def figure(standing: Standing, trial: TrialRecord) -> str:
    """The first objective of `trial`, with its unit."""
    metric = standing.problem.objectives[0].metric
    return f"{number(metrics_of(trial)[metric])} {METRICS[metric].unit}".strip()


SLICE_HEADINGS = ("slice", "study", "what", "measured", "device-hours", "why it was given", "how it ended")


def slice_row(slice_: Slice) -> tuple[str, ...]:
    """A slice in the table."""
    end = slice_.end
    return (
        str(slice_.number),
        slice_.study,
        slice_.kind.value,
        "-" if end is None else str(end.measured),
        "-" if end is None else number(end.device_hours),
        slice_.why,
        "it runs" if end is None else end.reason,
    )


def moment(at_s: float) -> str:
    """A moment of the record, in UTC."""
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M} UTC"


def campaign_json(told: CampaignStory) -> dict[str, Json]:
    """For programs: the status, each study's own report, and the slices."""
    return {
        **status_json(told.status),
        "answer": told.answer,
        "reports": {chapter.name: report_json(chapter.report) for chapter in told.chapters if chapter.report},
        "learnt_from": {chapter.name: list(chapter.earlier) for chapter in told.chapters},
        "given_out": [_slice_json(slice_) for slice_ in told.view.memory.slices],
    }


def _slice_json(slice_: Slice) -> Json:
    end = slice_.end
    return {
        "number": slice_.number,
        "study": slice_.study,
        "kind": slice_.kind.value,
        "begun": moment(slice_.begun_s),
        "why": slice_.why,
        "ended": None if end is None else moment(end.at_s),
        "reason": None if end is None else end.reason,
        "measured": None if end is None else end.measured,
        "device_hours": None if end is None else end.device_hours,
        "dollars": None if end is None else end.dollars,
    }


def campaign_markdown(told: CampaignStory) -> str:
    """As a Markdown text."""
    name = told.view.campaign.name
    mark = ["**EMULATED: no figure was measured on the hardware that is named.**", ""] if told.emulated else []
    parts = [
        f"# Campaign {name}",
        "",
        *mark,
        told.answer,
        "",
        *(f"- {fact}" for fact in told.facts),
        "",
        "## Studies",
        "",
        *_table(HEADINGS, [row_of(chapter) for chapter in told.chapters]),
        "",
        *(line for chapter in told.chapters for line in _chapter_lines(chapter)),
        "## Where the budget went",
        "",
        *_table(SLICE_HEADINGS, [slice_row(slice_) for slice_ in told.view.memory.slices]),
        "",
        "## Failures",
        "",
        *(_failure_lines(told) or ["None."]),
        "",
        "## Commands",
        "",
        *(f"- {what}: `{command}`" for what, command in told.commands),
    ]
    return "\n".join(parts) + "\n"


def _chapter_lines(chapter: Chapter) -> list[str]:
    if chapter.story is None:
        return [f"### {chapter.name}", "", "Not begun.", ""]
    learnt = [f"Learnt from: {'; '.join(chapter.earlier)}."] if chapter.earlier else []
    return [f"### {chapter.name}", "", chapter.story.answer, "", *learnt, *([""] if learnt else [])]


def _failure_lines(told: CampaignStory) -> list[str]:
    return [f"- {count} {reason}" for reason, count in failures(told.view.standings).items()]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return lines + [f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |" for row in rows]
