"""Optuna's samplers on a table, without any model: what the search is compared with.

How a table is shown to them: every column that varies (and is no function of the columns before it) is a parameter.
Numbers are integers that count the values in order, so that samplers which understand order can use it; names are
categorical. A combination that no row holds is answered by the nearest row: mode first, then the number of differing
names plus the rank distances of the numbers, ties by chance. A row that was measured before is answered from memory at
no cost. After `PATIENCE` such answers in a row the next measurement is a random new row. All of this favours the
samplers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from benchmarks.search.tables import Table, parameter_columns, to_minimise

PATIENCE = 30

SamplerFactory = Callable[[int], optuna.samplers.BaseSampler]
SAMPLERS: dict[str, SamplerFactory] = {
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
}


class TableSpace:
    """A table as the search space of an Optuna sampler."""

    def __init__(self, table: Table) -> None:
        self.names = parameter_columns(table)
        self.codes = np.stack([_codes(table, name) for name in self.names], axis=1)
        self.levels = self.codes.max(0) + 1
        self.numeric = np.array([name not in table.categories for name in self.names])
        modes = table.rows["mode"].to_numpy()
        self._mode_column = self.names.index("mode") if "mode" in self.names else None
        self._mode_codes = modes

    def distributions(self) -> dict[str, BaseDistribution]:
        """One distribution for each column."""
        return {
            name: IntDistribution(0, int(levels) - 1) if number else CategoricalDistribution(tuple(range(int(levels))))
            for name, levels, number in zip(self.names, self.levels, self.numeric, strict=True)
        }

    def nearest(self, params: dict[str, int], rng: np.random.Generator) -> int:
        """The row that a choice of parameters stands for."""
        wanted = np.array([params[name] for name in self.names])
        gap = np.abs(self.codes - wanted)
        scaled = np.where(self.numeric, gap / np.maximum(self.levels - 1, 1), gap > 0)
        # What the row does not have (code -1), a size of another role say, is no difference.
        scaled = np.where(self.codes < 0, 0.0, scaled)
        if self._mode_column is not None:
            scaled[:, self._mode_column] *= len(self.names)
        distance = scaled.sum(1)
        return int(rng.choice(np.flatnonzero(distance <= distance.min() + 1e-12)))


def _codes(table: Table, name: str) -> np.ndarray:
    """Places among the known values (n,), -1 for what a row does not have."""
    is_name = name in table.categories
    values = table.rows[name].to_numpy().astype(str) if is_name else table.rows[name].to_numpy(float)
    absent = values == "" if is_name else np.isnan(values)
    return np.where(absent, -1, np.searchsorted(np.unique(values[~absent]), values)).astype(int)


def sampler_order(table: Table, name: str, seed: int) -> Iterator[int]:
    """Rows in the order in which sampler `name` has them measured, each once, until all are."""
    space, values = TableSpace(table), to_minimise(table.values)
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(directions=["minimize"] * values.shape[1], sampler=SAMPLERS[name](seed))
    distributions = space.distributions()
    seen: set[int] = set()
    idle = 0
    while len(seen) < len(table):
        trial = study.ask(distributions)
        row = space.nearest(trial.params, rng)
        if table.started[row]:
            study.tell(trial, values[row].tolist())
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        idle = idle + 1 if row in seen else 0
        if idle >= PATIENCE:
            row, idle = int(rng.choice(sorted(set(range(len(table))) - seen))), 0
            if table.started[row]:
                study.add_trial(_known_trial(space, row, distributions, values[row]))
        if row not in seen:
            seen.add(row)
            yield row


def _known_trial(
    space: TableSpace, row: int, distributions: dict[str, BaseDistribution], values: np.ndarray
) -> optuna.trial.FrozenTrial:
    params = {name: int(max(code, 0)) for name, code in zip(space.names, space.codes[row], strict=True)}
    return optuna.trial.create_trial(params=params, distributions=distributions, values=values.tolist())


def random_order(table: Table, seed: int) -> Iterator[int]:
    """Every row once, in random order."""
    yield from np.random.default_rng(seed).permutation(len(table)).tolist()
