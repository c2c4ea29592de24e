"""How much each parameter matters to each objective, as Optuna's evaluators see it in the finished trials of a study.

Trials that a model screened are no fair sample of the space: what the search left alone has few trials, and what it
settled on hardly varies. Importances say what mattered among the trials that were made.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec

import optuna
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from search_spaces.metrics import Direction
from studies.history import StudyHistory, load_optuna_study

LEAST_TRIALS = 8
"""Fewer measured trials than this say nothing: forests and densities over a handful follow chance."""


class Evaluator(StrEnum):
    """Ways to tell importances: shares of the variance by a forest, or of what sets the best quantile apart."""

    FANOVA = "fanova"
    PED_ANOVA = "ped-anova"


@dataclass(frozen=True, kw_only=True)
class Importances:
    """Importances by parameter (they sum to 1) by objective; `trials` counts the measured trials that they rest on."""

    evaluator: Evaluator
    trials: int
    by_objective: Mapping[str, Mapping[str, float]]


def has_fanova() -> bool:
    """True where scikit-learn, which Optuna's fANOVA needs, is installed."""
    return find_spec("sklearn") is not None


def importances(history: StudyHistory, evaluator: Evaluator, seed: int = 0) -> Importances:
    """Importances of the parameters that vary among the measured trials; none with fewer than `LEAST_TRIALS`."""
    study = load_optuna_study(history.storage, history.name)
    trials = [t for t in study.get_trials(deepcopy=False) if t.state is OptunaState.COMPLETE and t.values]
    varying = _varying(trials)
    if len(trials) < LEAST_TRIALS or not varying:
        return Importances(evaluator=evaluator, trials=len(trials), by_objective={})
    return Importances(
        evaluator=evaluator,
        trials=len(trials),
        by_objective={
            name: _of_objective(study, index, direction, evaluator, varying, seed)
            for index, (name, direction) in enumerate(zip(history.objectives, history.directions, strict=True))
        },
    )


def _varying(trials: list[FrozenTrial]) -> list[str]:
    """Parameters that every trial has, and that have more than one value."""
    common = set.intersection(*(set(trial.params) for trial in trials)) if trials else set()
    return sorted(name for name in common if len({trial.params[name] for trial in trials}) > 1)


def _of_objective(
    study: optuna.Study, index: int, direction: Direction, evaluator: Evaluator, names: list[str], seed: int
) -> dict[str, float]:
    sign = -1.0 if direction is Direction.MAXIMIZE else 1.0  # PED-ANOVA takes lower for better, fANOVA does not mind

    def target(trial: FrozenTrial) -> float:
        return sign * float(trial.values[index])

    chosen = (
        FanovaImportanceEvaluator(seed=seed)
        if evaluator is Evaluator.FANOVA
        else PedAnovaImportanceEvaluator(target_quantile=0.25)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator computes", UserWarning)  # `target` minds it
        found = optuna.importance.get_param_importances(study, evaluator=chosen, params=names, target=target)
    return {name: float(share) for name, share in found.items()}
