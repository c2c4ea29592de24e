"""How far figures are off that no measurement has corrected.

On GPUs this is learned from public measured runs and kept with the prior (`benchmarks/fit_prior.py` writes it): the
spread of measured over predicted with tables of operations, by mode, and without any table, where all comes from the
roofline. Each is the standard deviation of a logarithm whose normal 90% interval holds nine of ten runs. No public run
tells of engines on CPU cores: theirs are guesses, no smaller than what `benchmarks/collect_accuracy.py` finds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from perf_model.prior import SHIPPED
from search_spaces.errors import InvalidValueError
from search_spaces.serving import Mode

_NO_TABLES = "no tables"
_EXACT = frozenset({"devices", "price_per_hour", "error_rate"})
_KNOWN_BY = {"itl": "tpot", "ttft": "ttft", "tpot": "tpot"}


@dataclass(frozen=True, kw_only=True)
class RawErrors:
    """Standard deviations of the logarithms of "ttft", "tpot" and "e2e" where tables back a figure, and without."""

    with_tables: Mapping[str, float]
    without: Mapping[str, float]

    def log_stddev(self, metric: str, roofline_share: float) -> float:
        """Standard deviation of the logarithm of a raw figure; exact figures (devices, price) have none.

        Rates and costs are off as E2E is, which they follow from. `roofline_share` is the share of a step's time that
        no table backs: variances mix in that proportion.
        """
        if metric in _EXACT:
            return 0.0
        name = _KNOWN_BY.get(metric.split("_", maxsplit=1)[0], "e2e")
        backed, bare = self.with_tables[name] ** 2, self.without[name] ** 2
        return math.sqrt(backed + roofline_share * max(bare - backed, 0.0))


ON_CORES = RawErrors(
    with_tables={"ttft": 0.4, "tpot": 0.2, "e2e": 0.22},
    without={"ttft": 0.5, "tpot": 0.36, "e2e": 0.37},
)


@cache
def on_gpus(mode: Mode) -> RawErrors:
    """What public runs in `mode` say; raises `InvalidValueError` where the shipped file does not hold it."""
    try:
        held = json.loads(SHIPPED.read_text(encoding="utf-8"))["raw"]
        return RawErrors(with_tables=held[mode.value], without=held[_NO_TABLES])
    except (OSError, KeyError, ValueError) as error:
        raise InvalidValueError(
            f"{SHIPPED} tells no errors of raw figures ({error}); make it anew with benchmarks/fit_prior.py"
        ) from error
