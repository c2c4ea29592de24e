"""Which settings went with the differences that were measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from search_spaces.serving import Candidate, OptionValue
from studies.records import TrialRecord
from tuner.report import metrics_of

LEAST_TRIALS = 6
"""Fewer measured candidates than this say nothing about settings."""
_ROUNDING = 1e-18
"""Variance of logarithms that is rounding alone: values that differ by a part in a billion are equal."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """`share` of the variance of a metric's logarithm that goes with `setting`, in 0..1, which had `values` values."""

    setting: str
    share: float
    values: int


def importances(trials: Sequence[TrialRecord], metric: str) -> tuple[Importance, ...]:
    """The settings that differ between the measured `trials`, most important first; empty with too few of them.

    For each setting alone the share of the variance of log(metric) between its values, corrected for their number
    (Kelley's epsilon squared, 1 - (n-1)/(n-k) * SSW/SST, not below 0). Settings move together in a search, so that
    shares overlap, and none of them proves a cause. A setting of a role is looked at where that role is.
    """
    known = [t for t in trials if t.candidate is not None and metrics_of(t).get(metric, 0.0) > 0]
    if len(known) < LEAST_TRIALS:
        return ()
    logs = np.log([metrics_of(trial)[metric] for trial in known])
    settings = [settings_of(trial.candidate) for trial in known if trial.candidate is not None]
    names = sorted({name for found in settings for name in found})
    shares = [_importance(name, settings, logs) for name in names]
    return tuple(sorted((i for i in shares if i is not None), key=lambda i: (-i.share, i.setting)))


def settings_of(candidate: Candidate) -> Mapping[str, OptionValue]:
    """Every setting of a candidate by name: mode, load, and for each role its pool, sizes and options."""
    config, load = candidate.config, candidate.load
    found: dict[str, OptionValue] = {
        "engine": config.engine,
        "mode": str(config.mode),
        load.arrival.load_unit: load.value,
    }
    for pool in config.pools:
        inside = {"node_pool": pool.node_pool, "replicas": pool.replicas, **asdict(pool.parallelism)}
        found |= {f"{pool.role}.{name}": value for name, value in (inside | dict(pool.options)).items()}
    return found


def _importance(
    name: str, settings: Sequence[Mapping[str, OptionValue]], every: NDArray[np.float64]
) -> Importance | None:
    share = share_of_variance(name, settings, every)
    values = len({found[name] for found in settings if name in found})
    return None if share is None else Importance(setting=name, share=share, values=values)


def share_of_variance(
    name: str, settings: Sequence[Mapping[str, OptionValue]], every: NDArray[np.float64]
) -> float | None:
    """The share of the variance of `every` (one value for each of `settings`) that goes with setting `name`.

    None where the setting has one value, or too few have it, or each a value of its own.
    """
    there = [name in found for found in settings]
    logs = every[there]
    if len(logs) < LEAST_TRIALS:
        return None
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for found, log in zip((found for found in settings if name in found), logs, strict=True):
        groups[found[name]].append(float(log))
    count, kinds = len(logs), len(groups)
    total = float(((logs - logs.mean()) ** 2).sum())
    if kinds < 2 or kinds >= count or total <= _ROUNDING * count:
        return None
    within = math.fsum(float(((np.array(g) - np.mean(g)) ** 2).sum()) for g in groups.values())
    share = 1.0 - (count - 1) / (count - kinds) * within / total
    return min(1.0, max(0.0, share))
