"""`tuner whatif`: what the calibrated model of a study says of changed settings, loads, users or nodes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli_options import AsJson, StorageOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from search_spaces.outcome import Prediction
    from studies.codec import Json
    from tuner.whatif import Answer, WhatIf


def whatif(
    name: Annotated[str, typer.Argument(help="Name of a study.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Of the configuration (decode.tp=4, mixed.max_num_seqs=64, load=32) or of the study file "
            "(workload.isl=4096, node_pools.main.device=h200_sxm).",
        ),
    ] = None,
    trial: Annotated[str, typer.Option("--trial", help="The trial to start from: its number, or best.")] = "best",
    storage: StorageOption = None,
    as_json: AsJson = False,
) -> None:
    """Ask the model that a study has corrected for something else; nothing is measured, and nothing is written."""
    from tuner.places import existing_place
    from tuner.stored import history_of
    from tuner.whatif import what_if

    place = existing_place(storage)
    found = what_if(history_of(place, name), place, settings or [], trial=trial)
    if as_json:
        print(json.dumps(whatif_json(found), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    for part in shown(found):
        console.print(part, soft_wrap=isinstance(part, str))


def shown(found: WhatIf) -> list[RenderableType]:
    """The answers for people."""
    from tuner.wording import candidate_text

    emulated = " of an EMULATED study" if found.emulated else ""
    lines: list[RenderableType] = [
        f"PREDICTED by the model{emulated}, nothing was measured: {found.study}, from trial {found.base.number}",
        *(f"  {note}" for note in found.notes),
        *(f"  changed: {change}" for change in (*found.settings, *found.changes) if change),
    ]
    if found.base.candidate is not None:
        lines.append(f"\ntrial {found.base.number}: {candidate_text(found.base.candidate)}")
    for answer in found.answers:
        lines += _answer_shown(found, answer)
    return lines


def _answer_shown(found: WhatIf, answer: Answer) -> list[RenderableType]:
    from tuner.wording import candidate_text, number, slo_text

    lines: list[RenderableType] = [f"\nasked: {candidate_text(answer.candidate)}"]
    if answer.prediction.infeasible is not None:
        return [*lines, f"  CANNOT RUN: {answer.prediction.infeasible}"]
    lines.append(_table(found, answer))
    lines += [
        f"  {slo_text(slo)}: met with probability {number(answer.chances[slo.metric])}"
        for slo in found.problem.slos
        if slo.metric in answer.chances
    ]
    if answer.measured is not None:
        lines.append(f"  trial {answer.measured} measured exactly this; see: tuner study show {found.study}")
    if answer.extrapolated:
        lines.append("  EXTRAPOLATED, beyond what the study measured:")
        lines += [f"    {text}" for text in answer.extrapolated]
    else:
        lines.append("  inside the range of what the study measured")
    return lines


def _table(found: WhatIf, answer: Answer) -> RenderableType:
    from rich import box
    from rich.table import Table

    from search_spaces.metrics import METRICS
    from tuner.report import metrics_of
    from tuner.wording import number

    table = Table(box=box.SIMPLE_HEAD)
    headings = ("metric", "measured\nof the trial", "model\nof the trial", "model\nas asked", "90% interval", "change")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "metric" else "right", overflow="fold")
    measured = metrics_of(found.base)
    for metric in found.metrics:
        value, interval = answer.prediction.metrics.get(metric), answer.interval(metric)
        if value is None or interval is None:
            continue
        before = found.base_prediction.metrics.get(metric)
        table.add_row(
            f"{metric} ({METRICS[metric].unit})",
            number(measured[metric]) if metric in measured else "-",
            number(before) if before is not None else "-",
            number(value),
            f"{number(interval[0])} to {number(interval[1])}",
            f"{value / before - 1:+.0%}" if before else "-",
        )
    return table


def whatif_json(found: WhatIf) -> dict[str, Json]:
    """The answers for programs."""
    from tuner.report import metrics_of
    from tuner.wording import candidate_json

    base = found.base
    return {
        "predicted": True,
        "study": found.study,
        "emulated": found.emulated,
        "notes": list(found.notes),
        "settings": list(found.settings),
        "changes": list(found.changes),
        "measurements": found.measurements,
        "from": {
            "trial": base.number,
            "configuration": candidate_json(base.candidate) if base.candidate else None,
            "measured": dict(metrics_of(base)),
            "predicted": _prediction_json(found.base_prediction),
        },
        "answers": [
            {
                "configuration": candidate_json(answer.candidate),
                **_prediction_json(answer.prediction),
                "chance_of_meeting": dict(answer.chances),
                "extrapolated": list(answer.extrapolated),
                "measured_as_trial": answer.measured,
            }
            for answer in found.answers
        ],
    }


def _prediction_json(prediction: Prediction) -> dict[str, Json]:
    from tuner.whatif import interval_90

    found = {metric: interval_90(prediction, metric) for metric in prediction.metrics}
    intervals: dict[str, Json] = {metric: list(ends) for metric, ends in found.items() if ends is not None}
    return {"infeasible": prediction.infeasible, "metrics": dict(prediction.metrics), "intervals_90": intervals}
