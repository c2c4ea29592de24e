"""A comparison of studies as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table

from search_spaces.metrics import METRICS
from studies.codec import Json, to_json
from studies.records import TrialRecord
from tuner.compare_causes import Cause, Explained
from tuner.comparison import DRAWS, Best, Comparison, Shared, Volume
from tuner.report import configuration_text, mark, metrics_of
from tuner.wording import candidate_json, metric_label, number, slo_text

MARKS = (
    "*: the best; =: within the noise of it; ?: whether it differs by more than the noise is not known, since nothing "
    "was repeated. Not corrected for the number of comparisons, nor for the best of many being lucky."
)
"""What the marks of the table of the best mean."""
MOST_LINES = 12
"""Differences of study files shown in a table; JSON and HTML have all."""


def shown(
    found: Comparison, explained: Sequence[Explained], questions: Mapping[str, Sequence[str]]
) -> list[RenderableType]:
    """The comparison for people."""
    lines: list[RenderableType] = [
        f"Comparison of {', '.join(f'{report.name}{mark(report)}' for report in found.reports)}",
        f"  objectives  {'; '.join(map(metric_label, found.objectives))}",
        f"  SLOs        {'; '.join(map(slo_text, found.slos)) or 'none'}",
        *(f"  note: {note}" for note in found.notes),
    ]
    for name, changes in questions.items():
        lines += _question(found.names[0], name, changes)
    lines += ["", _volumes(found), volume_words(found), "", _best(found), MARKS, *_configurations(found)]
    if found.shared:
        lines += ["", *map(shared_text, found.shared)]
    if explained:
        lines += ["", "What sets the best configurations apart (effects are PREDICTED, one setting at a time):"]
        lines += [text for one in explained for text in explained_text(one)]
    return lines


def _question(first: str, name: str, changes: Sequence[str]) -> list[str]:
    if not changes:
        return [f"  {name} asks the same question as {first}"]
    more = [f"    and {len(changes) - MOST_LINES} more (--json has all)"] if len(changes) > MOST_LINES else []
    return [f"  {name} asks otherwise than {first}:", *(f"    {line}" for line in changes[:MOST_LINES]), *more]


def _volumes(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    headings = ("study", "share of the\njoint hypervolume", "95% interval", "front", "on the\njoint front", "measured")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "study" else "right", overflow="fold")
    for report in found.reports:
        volume = found.volumes.get(report.name)
        if volume is None:
            table.add_row(report.name, "-", "-", "0", "0", "0")
            continue
        table.add_row(
            report.name,
            f"{volume.share:.1%}",
            interval_text(volume),
            str(volume.members),
            str(volume.joint),
            str(len(report.measured)),
        )
    return table


def interval_text(volume: Volume) -> str:
    """The 95% interval of a share."""
    return f"{volume.low:.1%} to {volume.high:.1%}" if volume.low is not None and volume.high is not None else "unknown"


def volume_words(found: Comparison) -> str:
    """Which hypervolumes differ by more than the noise, in a sentence for each pair."""
    texts: list[str] = []
    first = found.names[0]
    for name in found.names[1:] if found.volumes else ():
        difference = found.share_difference(first, name)
        if difference is None:
            texts.append(f"{name} against {first}: whether the hypervolumes differ by more than the noise is not known")
            continue
        low, high = difference
        verdict = "differs by more than the noise" if low > 0 or high < 0 else "within the noise"
        texts.append(f"{name} - {first}: {low:+.1%} to {high:+.1%} of the joint hypervolume (95%), {verdict}")
    return "\n".join([*texts, f"Intervals: {DRAWS} draws of the front's members within their noise (docs/compare.md)."])


def _best(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("best under", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in found.names:
        table.add_column(name, justify="right", overflow="fold")
    for best in found.best:
        metric = f"{best.metric} ({METRICS[best.metric].unit})"
        table.add_row(best.condition, metric, *(best_text(found, best, name) for name in found.names))
    return table


def best_text(found: Comparison, best: Best, name: str) -> str:
    """The figure of a study, with `*` where it is the best and `=` where it differs from that by no more than noise."""
    trial = best.trials[name]
    if trial is None:
        return "none"
    text = found.report(name).spreads.figure(trial, best.metric)
    if name == best.winner:
        return f"{text} *"
    return f"{text} {({True: '', False: '=', None: '?'})[best.clear.get(name)]}".rstrip()


def _configurations(found: Comparison) -> list[str]:
    """The configurations of the best ones under all SLOs, each once."""
    if not found.best:
        return []
    lines: dict[str, None] = {}
    for best in found.best:
        if best.condition == found.best[0].condition:
            for name, trial in best.trials.items():
                if trial is not None:
                    lines[f"  {name} trial {trial.number}: {configuration_text(found.report(name), trial)}"] = None
    return list(lines)


def shared_text(shared: Shared) -> str:
    """What was measured of the same configurations, in a sentence."""
    known = "of unknown noise" if shared.differing is None else f"{shared.differing} differ by more than the noise"
    return (
        f"{shared.pairs} configurations were measured by both {shared.first} and {shared.second}: {shared.metric} of "
        f"{shared.second} is {number(shared.ratio)} times that of {shared.first} (median), {known}"
    )


def explained_text(one: Explained) -> list[str]:
    """An explanation in lines."""
    clear = "more than the noise" if one.clear else "noise not known"
    head = f"  {one.metric}: {one.winner} is better than {one.other} ({clear})"
    if not one.causes:
        return [f"{head}; the two configurations have the same settings"]
    return [head, *(f"    {cause_text(cause)}" for cause in one.causes)]


def cause_text(cause: Cause) -> str:
    """A setting and its predicted effect."""
    effect = "no prediction for it alone" if cause.effect is None else f"alone {cause.effect - 1:+.0%}"
    return f"{cause.setting}: {cause.winner} against {cause.other}, {effect}"


def comparison_json(
    found: Comparison, explained: Sequence[Explained], questions: Mapping[str, Sequence[str]]
) -> dict[str, Json]:
    """The comparison for programs."""
    return {
        "studies": list(found.names),
        "objectives": list(found.objectives),
        "slos": [to_json(slo) for slo in found.slos],
        "notes": list(found.notes),
        "emulated": {report.name: report.emulated for report in found.reports},
        "study_file_differences": {name: list(lines) for name, lines in questions.items()},
        "reference_point": None if found.reference is None else [float(value) for value in found.reference],
        "hypervolumes": {name: to_json(volume) for name, volume in found.volumes.items()},
        "hypervolume_share_differences": _differences_json(found),
        "fronts": {name: [_trial_json(trial) for trial in members] for name, members in found.fronts.items()},
        "best": [_best_json(found, best) for best in found.best],
        "measured_by_both": [to_json(shared) for shared in found.shared],
        "explained": [to_json(one) for one in explained],
    }


def _differences_json(found: Comparison) -> dict[str, Json]:
    """Intervals of the share of each study less that of the first one; null where the noise is not known."""
    if not found.volumes:
        return {}
    first = found.names[0]
    pairs = {name: found.share_difference(first, name) for name in found.names[1:]}
    return {name: None if pair is None else list(pair) for name, pair in pairs.items()}


def _trial_json(trial: TrialRecord) -> Json:
    return {
        "trial": trial.number,
        "configuration": candidate_json(trial.candidate) if trial.candidate else None,
        "metrics": dict(metrics_of(trial)),
    }


def _best_json(found: Comparison, best: Best) -> Json:
    numbers: dict[str, Json] = {name: trial.number if trial else None for name, trial in best.trials.items()}
    clear: dict[str, Json] = {n: verdict for n, verdict in best.clear.items() if n != best.winner}
    return {
        "condition": best.condition,
        "metric": best.metric,
        "trials": numbers,
        "values": {name: best.value(name) for name in found.names},
        "winner": best.winner,
        "differs_by_more_than_noise": clear,
    }
