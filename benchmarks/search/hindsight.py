"""What a search could know at best that corrects this model: each answer of the table but the one that it asks for.

Before a candidate is measured, its prediction is what a surrogate makes of the measurements of *all other* candidates
of the table (leave-one-out, Rasmussen and Williams, 2006, equation 5.12). No search knows as much, though one may be
luckier; what this one still measures in vain is what a configuration does that its neighbours do not tell.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.search.modelled import Modelled, next_rows
from perf_model.surrogate import HyperPrior, fit
from studies.acquisition import Beliefs


def hindsight_order(modelled: Modelled, priors: tuple[HyperPrior, ...], seed: int) -> Iterator[int]:
    """Candidates in the order in which a search measures them whose beliefs are those of `told_all_others`."""
    beliefs = told_all_others(modelled, priors)
    measured: list[int] = []
    while len(measured) < len(modelled.table):
        measured += next_rows(modelled.table, beliefs, measured, seed)
        yield measured[-1]


def told_all_others(modelled: Modelled, priors: tuple[HyperPrior, ...]) -> Beliefs:
    """What the answers of all other candidates tell of each; hyperparameters are fitted to every answer."""
    n = len(modelled.table)
    told = [_leave_one_out(modelled, k, prior) for k, prior in enumerate(priors)]
    return Beliefs(
        mean=modelled.log_mean + np.column_stack([mean for mean, _ in told]),
        stddev=np.column_stack([stddev for _, stddev in told]),
        start=np.ones(n),
        seconds=np.ones(n),
    )


def _leave_one_out(modelled: Modelled, metric: int, prior: HyperPrior) -> tuple[np.ndarray, np.ndarray]:
    """Mean (n,) and standard deviation (n,) of log(measured / predicted) of each candidate, given the others'."""
    surrogate = fit(modelled.features, modelled.log_ratio[:, metric], prior=prior)
    precision = (np.linalg.inv(surrogate.factor) ** 2).sum(0)
    return surrogate.log_ratio - surrogate.weights / precision, np.sqrt(1.0 / precision)
