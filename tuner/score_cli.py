"""`tuner study rescore`: an old study under new SLOs, without measuring and without writing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from search_spaces.errors import InvalidValueError
from tuner.cli_options import AsJson, StorageOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from search_spaces.slos import Slo
    from studies.history import StudyHistory
    from tuner.places import Place
    from tuner.score import Scored
    from tuner.study_schema import StudyFile


def rescore(
    name: Annotated[str, typer.Argument(help="Name of a study.")],
    slos: Annotated[
        list[str] | None,
        typer.Option(
            "--slo", help="METRIC=THRESHOLD, METRIC={threshold: .., kind: soft, ..}, or METRIC=none to drop it."
        ),
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="Objectives of the score; the study's by default.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Configurations to show.")] = 20,
    storage: StorageOption = None,
    as_json: AsJson = False,
) -> None:
    """Rank the measured configurations of a study under other SLOs; nothing is measured, and nothing is written."""
    from tuner.places import existing_place
    from tuner.score import ranked
    from tuner.stored import history_of, stored_file
    from tuner.wiring import make_problem

    place = existing_place(storage)
    history = history_of(place, name)
    before = make_problem(stored_file(history, place))
    after = make_problem(with_slos(history, place, slos or []))
    objectives = tuple(by or (objective.metric for objective in before.objectives))
    trials = history.trials()
    now, then = (ranked(trials, objectives, problem.slos) for problem in (after, before))
    earlier = {item.trial.number: item.rank for item in then}
    if as_json:
        print(json.dumps(rescore_json(name, objectives, after.slos, now, earlier), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    for line in _notes(objectives, before.slos, after.slos):
        console.print(line)
    console.print(rescore_table(now[:top], objectives, after.slos, earlier))


def with_slos(history: StudyHistory, place: Place, given: Sequence[str]) -> StudyFile:
    """The stored study file with the SLOs that `given` (`METRIC=...`) adds, changes or drops."""
    from tuner.stored import stored_file

    slos = stored_file(history, place).model_dump(mode="json")["slos"]
    for text in given:
        metric, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise InvalidValueError(f"--slo {text!r} is no SLO; write such as --slo ttft_p95_ms=500")
        try:
            wanted = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidValueError(f"--slo {text!r}: {value!r} is no valid YAML value; quote it") from error
        if wanted in (None, "none"):
            slos.pop(metric.strip(), None)
        else:
            slos[metric.strip()] = wanted
    found = stored_file(history, place, [f"slos={json.dumps(slos)}"])
    _check_measured(history, tuple(found.slos))
    return found


def _check_measured(history: StudyHistory, metrics: Sequence[str]) -> None:
    """Raise where no measurement of the study has one of `metrics`: other percentiles are measured when asked for."""
    from tuner.score import measured_configurations

    measured = measured_configurations(history.trials())
    for metric in metrics:
        if measured and not any(metric in each.metrics for each in measured):
            raise InvalidValueError(
                f"no measurement of study {history.name} has {metric}; choose a mean, p50, p90, p95 or p99, "
                "or another metric that is known there"
            )


def _notes(objectives: Sequence[str], before: Sequence[Slo], after: Sequence[Slo]) -> list[str]:
    from tuner.wording import slo_text

    lines = [
        f"score: nearness to the best in {', '.join(objectives)}, times 1 - penalty of each SLO",
        f"SLOs of the study: {'; '.join(map(slo_text, before)) or 'none'}",
        f"SLOs here:         {'; '.join(map(slo_text, after)) or 'none'}",
    ]
    if any(name.startswith("goodput") for name in objectives):
        lines.append("goodput was counted under the SLOs of the study, and stays as it was measured")
    return lines


def rescore_table(
    scored: Sequence[Scored], objectives: Sequence[str], slos: Sequence[Slo], earlier: Mapping[int, int]
) -> RenderableType:
    """The ranks under the new SLOs beside those under the study's own, best first."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from tuner.report import metric_heading
    from tuner.wording import candidate_text

    table = Table(box=box.SIMPLE_HEAD)
    shown = tuple(dict.fromkeys((*objectives, *(slo.metric for slo in slos))))
    for title in ("rank", "was", "trial", "score", "SLO\nfactor", *(metric_heading(name, 8) for name in shown)):
        table.add_column(title, justify="right", overflow="fold")
    for item in scored:
        table.add_row(
            str(item.rank),
            str(earlier.get(item.trial.number, "-")),
            str(item.trial.number),
            f"{item.score:.3f}" if item.feasible else "-",
            f"{item.multiplier:.3f}",
            *(_figure(item, metric) for metric in shown),
        )
    texts = [
        f"  {s.trial.number:>5}  {candidate_text(s.trial.candidate) if s.trial.candidate else '?'}" for s in scored
    ]
    note = Text("Beside a figure: (w) a warning of its SLO, (e) an error, (f) failed. A score of - is infeasible.")
    return Group(table, note, *map(Text, texts))


def _figure(item: Scored, metric: str) -> str:
    """The value of `metric`, with a letter where an SLO on it is missed."""
    from tuner.wording import number

    tier = item.tiers.get(metric)
    return number(item.metrics[metric]) + (f" ({tier[0]})" if tier is not None and tier != "met" else "")


def rescore_json(
    name: str, objectives: Sequence[str], slos: Sequence[Slo], scored: Sequence[Scored], earlier: Mapping[int, int]
) -> dict[str, object]:
    """The ranks for programs."""
    from dataclasses import asdict

    return {
        "study": name,
        "objectives": list(objectives),
        "slos": [asdict(slo) for slo in slos],
        "ranks": [
            {
                "rank": item.rank,
                "rank_before": earlier.get(item.trial.number),
                "trial": item.trial.number,
                "runs": item.runs,
                "score": item.score,
                "base_score": item.base,
                "multiplier": item.multiplier,
                "feasible": item.feasible,
                "penalties": dict(item.penalties),
                "tiers": {metric: str(tier) for metric, tier in item.tiers.items()},
                "metrics": dict(item.metrics),
                "emulated": bool(item.trial.measurement and item.trial.measurement.emulated),
            }
            for item in scored
        ],
    }
