"""`tuner study importance`: how much each parameter matters, by what was measured and by what the model expects.

Two answers beside each other, each with its weakness. Optuna's importances look at the measured trials, which the
screen chose: they are biased towards what was promising. The model's sensitivity looks at the whole space, but takes
the model's word: configurations are drawn evenly from the genotype and predicted by the corrected model, and the
share of the variance of log(metric) that each parameter alone accounts for is told (epsilon squared, see
`report_importance`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tuner.cli_options import AsJson, StorageOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from studies.history import StudyHistory
    from studies.importance import Importances
    from tuner.places import Place

SAMPLE = 1000
"""Configurations drawn from the space for the model's sensitivity."""
INSTALL = "pip install 'tuner[importance]'"


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Shares of the variance of log(metric) that go with each parameter alone, by metric; they need not sum to 1."""

    predicted: int
    by_metric: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Both answers for a study; `notes` say what weakens them."""

    study: str
    measured: Importances
    model: Sensitivity
    notes: tuple[str, ...]


def importance_command(
    name: Annotated[str, typer.Argument(help="Name of a study.")],
    evaluator: Annotated[
        Literal["auto", "fanova", "ped-anova"],
        typer.Option("--evaluator", help="fANOVA needs scikit-learn; auto takes PED-ANOVA without it."),
    ] = "auto",
    storage: StorageOption = None,
    as_json: AsJson = False,
) -> None:
    """Show how much each parameter matters to each objective, measured and as the model sees it."""
    from tuner.places import existing_place
    from tuner.stored import history_of

    place = existing_place(storage)
    found = importance(history_of(place, name), place, evaluator=evaluator)
    if as_json:
        print(json.dumps(importance_json(found), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    for part in shown(found):
        console.print(part, soft_wrap=isinstance(part, str))


def importance(
    history: StudyHistory, place: Place, *, evaluator: Literal["auto", "fanova", "ped-anova"] = "auto"
) -> Importance:
    """Both answers for the study of `history`; raises `TunerError` where fANOVA is asked for and not installed."""
    from search_spaces.errors import TunerError
    from studies.importance import LEAST_TRIALS, Evaluator, has_fanova, importances

    notes = ["the trials were chosen by a screened search: importances hold among them, not in the whole space"]
    if evaluator == "auto":
        chosen = Evaluator.FANOVA if has_fanova() else Evaluator.PED_ANOVA
        if chosen is Evaluator.PED_ANOVA:
            notes.append(f"PED-ANOVA stands in for fANOVA, which needs scikit-learn: {INSTALL}")
    else:
        chosen = Evaluator(evaluator)
        if chosen is Evaluator.FANOVA and not has_fanova():
            raise TunerError(f"fANOVA needs the package scikit-learn; install it with: {INSTALL}")
    measured = importances(history, chosen)
    if not measured.by_objective:
        notes.append(f"{measured.trials} measured trials are too few for importances; it takes {LEAST_TRIALS}")
    return Importance(study=history.name, measured=measured, model=sensitivity(history, place), notes=tuple(notes))


def sensitivity(history: StudyHistory, place: Place, seed: int = 0) -> Sensitivity:
    """The corrected model's sensitivity to each parameter of the space, for each objective."""
    import numpy as np

    from search_spaces.rules import infeasibility
    from tuner.report_importance import settings_of, share_of_variance
    from tuner.whatif import calibrated_study
    from tuner.wiring import make_space

    study = calibrated_study(history, place)
    space = make_space(study.file, study.problem)
    rng = random.Random(seed)  # noqa: S311 - a sample of configurations, no secret
    drawn = dict.fromkeys(space.sample(rng) for _ in range(min(SAMPLE, 4 * space.size)))
    able = [candidate for candidate in drawn if infeasibility(candidate, study.problem) is None]
    answers = zip(able, study.model.predict(able), strict=True)
    runnable = [(candidate, prediction) for candidate, prediction in answers if prediction.infeasible is None]
    settings = [settings_of(candidate) for candidate, _ in runnable]
    names = sorted({name for found in settings for name in found})
    by_metric: dict[str, dict[str, float]] = {}
    for metric in history.objectives:
        logs = np.array([np.log(max(prediction.metrics.get(metric, 0.0), 1e-12)) for _, prediction in runnable])
        shares = {name: share_of_variance(name, settings, logs) for name in names}
        known = {name: share for name, share in shares.items() if share is not None}
        by_metric[metric] = dict(sorted(known.items(), key=lambda pair: -pair[1]))
    return Sensitivity(predicted=len(runnable), by_metric=by_metric)


def shown(found: Importance) -> list[RenderableType]:
    """Both answers for people: a table for each objective."""
    from rich import box
    from rich.table import Table

    from tuner.wording import metric_label

    lines: list[RenderableType] = [f"What matters in {found.study}", *(f"  note: {note}" for note in found.notes)]
    for metric, model in found.model.by_metric.items():
        measured = found.measured.by_objective.get(metric, {})
        table = Table(title=metric_label(metric), box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("parameter", overflow="fold")
        table.add_column(f"{found.measured.evaluator},\n{found.measured.trials} measured trials", justify="right")
        table.add_column(f"model,\n{found.model.predicted:,} PREDICTED", justify="right")
        for name in sorted({*model, *measured}, key=lambda n: (-measured.get(n, 0.0), -model.get(n, 0.0), n)):
            cells = (f"{share:.0%}" if (share := of.get(name)) is not None else "-" for of in (measured, model))
            table.add_row(name, *cells)
        lines.append(table)
    lines.append(
        "Importances sum to 100%; of the model, what each parameter alone accounts for of the variance of the log."
    )
    return lines


def importance_json(found: Importance) -> dict[str, object]:
    """Both answers for programs."""
    return {
        "study": found.study,
        "notes": list(found.notes),
        "evaluator": str(found.measured.evaluator),
        "measured_trials": found.measured.trials,
        "importances": {metric: dict(shares) for metric, shares in found.measured.by_objective.items()},
        "model_predicted": found.model.predicted,
        "model_sensitivity": {metric: dict(shares) for metric, shares in found.model.by_metric.items()},
    }
