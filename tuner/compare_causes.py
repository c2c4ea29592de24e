"""Which settings set the best configurations of two studies apart, and what the model takes each of them to do.

The effect of a setting is that of the calibrated model of the second study: its best configuration with this one
setting taken from the other, all else as it is. Effects of several settings need not multiply to the whole: they act
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search_spaces.errors import InvalidValueError
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, OptionValue
from studies.history import StudyHistory
from tuner.comparison import Best, Comparison
from tuner.places import Place
from tuner.report_importance import settings_of
from tuner.stored import stored_file
from tuner.study_file import differences, dump_study
from tuner.whatif import LOAD, CalibratedStudy, calibrated_study, changed

NOT_ASKED = ("name:", "budget.", "seed:", "measurement.", "limits.")
"""Keys of a study file in which studies differ without asking anything else."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A setting that is `winner` in the better configuration and `other` in the other one.

    `effect` is the predicted factor on the metric of taking the winner's value alone; None where the model of the other
    study cannot say it (another mode or kind of node, a configuration that cannot run).
    """

    setting: str
    winner: OptionValue
    other: OptionValue
    effect: float | None


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What sets the best of `winner` apart from that of `other` in `metric`, under one condition."""

    condition: str
    metric: str
    winner: str
    other: str
    clear: bool | None
    causes: tuple[Cause, ...]


def explained(found: Comparison, histories: Mapping[str, StudyHistory], place: Place) -> tuple[Explained, ...]:
    """An explanation for every difference under all SLOs that is not known to be noise."""
    models: dict[str, CalibratedStudy] = {}
    first_condition = found.best[0].condition if found.best else ""
    result: list[Explained] = []
    for best in found.best:
        if best.winner is None or best.condition != first_condition:
            continue
        for name, clear in best.clear.items():
            if name != best.winner and clear is not False:
                if name not in models:
                    models[name] = calibrated_study(histories[name], place)
                result.append(_explained(best, best.winner, name, models[name]))
    return tuple(result)


def _explained(best: Best, winner: str, other: str, study: CalibratedStudy) -> Explained:
    ours, theirs = best.trials[winner], best.trials[other]
    better = ours.candidate if ours else None
    worse = theirs.candidate if theirs else None
    return Explained(
        condition=best.condition,
        metric=best.metric,
        winner=winner,
        other=other,
        clear=best.clear[other],
        causes=_causes(better, worse, study, best.metric) if better and worse else (),
    )


def _causes(better: Candidate, worse: Candidate, study: CalibratedStudy, metric: str) -> tuple[Cause, ...]:
    mine, theirs = settings_of(better), settings_of(worse)
    alike = better.config.mode is worse.config.mode and better.config.engine == worse.config.engine
    return tuple(
        Cause(
            setting=name,
            winner=mine[name],
            other=theirs[name],
            effect=_effect(worse, name, mine[name], study, metric) if alike else None,
        )
        for name in mine
        if name in theirs and mine[name] != theirs[name]
    )


def _effect(worse: Candidate, name: str, value: OptionValue, study: CalibratedStudy, metric: str) -> float | None:
    if name == worse.load.arrival.load_unit:
        name = LOAD
    try:
        one = changed(worse, {name: value})
        reason = infeasibility(one, study.problem)
        [study.problem.node_pool(pool.node_pool) for pool in one.config.pools]
    except InvalidValueError:  # a node pool, an option or a value that the other study does not know
        return None
    if reason is not None:
        return None
    before, after = study.model.predict([worse, one])
    base = before.metrics.get(metric, 0.0)
    return after.metrics[metric] / base if base > 0 and metric in after.metrics else None


def questions(histories: Sequence[StudyHistory], place: Place) -> dict[str, tuple[str, ...]]:
    """In what the study files of the others differ from the first one: `key: first -> other`, by name."""
    first, *others = histories
    base = dump_study(stored_file(first, place))
    return {
        history.name: tuple(
            line
            for line in differences(base, dump_study(stored_file(history, place)))
            if not line.startswith(NOT_ASKED)
        )
        for history in others
    }
