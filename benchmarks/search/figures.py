"""How good an order of measurements is: hypervolume found against measurements made.

Hypervolume is that of the *linear* objectives, as practitioners plot them and as Optuna and moocore compute it: the
table's true front is scaled to [0, 1] in every objective, and the reference point is the nadir plus a tenth of the
front's range (Ishibuchi et al., 2018), so that the front's extremes count too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import moocore
import numpy as np

from benchmarks.search.modelled import Forecast
from benchmarks.search.tables import Table, to_minimise
from studies.acquisition import front_scale, nondominated

TARGETS = (0.95, 0.99)
EARLY = 12
FORECASTS_UNTIL = 24
"""A search that forecasts goes on to this many measurements, so that every table counts in its errors."""


class Yardstick:
    """Shares of a table's hypervolume."""

    def __init__(self, table: Table, *, logarithmic: bool = False) -> None:
        values = table.values
        points = to_minimise(np.log(values) if logarithmic else values)
        self._started = table.started
        scale = front_scale(points[self._started])
        self._points, self._reference = scale.apply(points), scale.reference
        front = self._points[self._started]
        self._total = float(moocore.hypervolume(front[nondominated(front)], ref=self._reference))

    def share(self, rows: list[int]) -> float:
        """Share (0 to 1) of the table's hypervolume that `rows` hold."""
        points = self._points[[row for row in rows if self._started[row]]]
        return float(moocore.hypervolume(points, ref=self._reference)) / self._total if len(points) else 0.0

    def oracle(self) -> Run:
        """The fewest measurements that a search could do with which knows every answer (greedily)."""
        return replay(self, self._greedy())

    def _greedy(self) -> Iterable[int]:
        rows: list[int] = []
        candidates = np.flatnonzero(self._started)
        front = candidates[nondominated(self._points[candidates])].tolist()
        while front:
            best = max(front, key=lambda row: self.share([*rows, row]))
            front.remove(best)
            rows.append(best)
            yield best


@dataclass(frozen=True, kw_only=True)
class Run:
    """One search on one table.

    `needed` are measurements to each of TARGETS (those made, where the run ended before it was `reached`),
    `early_regret` the share of hypervolume missed after EARLY measurements (or when the run ended, where that was
    earlier).
    """

    needed: tuple[int, ...]
    reached: tuple[bool, ...]
    early_regret: float
    forecasts: tuple[Forecast, ...] = field(default=())


def replay(
    yardstick: Yardstick, order: Iterable[int], forecasts: list[Forecast] | None = None, *, limit: int | None = None
) -> Run:
    """Follow `order` until the last target is reached, and to FORECASTS_UNTIL where it writes `forecasts`.

    It ends after `limit` measurements whatever was reached.
    """
    least = 0 if forecasts is None else FORECASTS_UNTIL
    rows: list[int] = []
    needed: list[int] = []
    early = 0.0
    for row in order:
        rows.append(row)
        share = yardstick.share(rows)
        early = share if len(rows) <= EARLY else early
        while len(needed) < len(TARGETS) and share >= TARGETS[len(needed)] - 1e-12:
            needed.append(len(rows))
        if (len(needed) == len(TARGETS) and len(rows) >= least) or len(rows) == limit:
            break
    missing = len(TARGETS) - len(needed)
    return Run(
        needed=(*needed, *[len(rows)] * missing),
        reached=(True,) * len(needed) + (False,) * missing,
        early_regret=1.0 - early,
        forecasts=tuple((forecasts or ())[:least]),
    )
