"""The candidate of a space that is nearest to one of another: how what was found once is tried elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

from search_spaces.serving import Candidate, OptionValue
from search_spaces.space import PARALLEL_SIZES, Genotype, Parameter, Space


def nearest(space: Space, candidate: Candidate, node_pools: Mapping[str, str]) -> Candidate | None:
    """`candidate` with every setting at the nearest choice of `space`; None without its engine or its mode.

    `node_pools` maps its node pools to those of the space; a pool that is not named there, like every setting that the
    space has and the candidate does not, is as in the space's default. Numbers are near by their ratio. A load of
    another kind (a rate for requests in flight) is the default's.
    """
    config = candidate.config
    if config.engine not in space.engines or config.mode not in space.modes:
        return None
    genes = space.encode(space.default(config.mode, config.engine))
    theirs = _genes(candidate, node_pools)
    if candidate.load.arrival.load_unit == space.load_name:
        theirs[space.load_name] = candidate.load.value
    chosen = {p.name: _closest(p, theirs.get(p.name), genes[p.name]) for p in space.parameters}
    return space.decode(chosen)


def _genes(candidate: Candidate, node_pools: Mapping[str, str]) -> Genotype:
    genes: Genotype = {"engine": candidate.config.engine, "mode": str(candidate.config.mode)}
    for pool in candidate.config.pools:
        genes[f"{pool.role}.replicas"] = pool.replicas
        genes |= {f"{pool.role}.{name}": getattr(pool.parallelism, name) for name in PARALLEL_SIZES}
        genes |= {f"{pool.role}.{name}": value for name, value in pool.options}
        if pool.node_pool in node_pools:
            genes[f"{pool.role}.node_pool"] = node_pools[pool.node_pool]
    return genes


def _closest(parameter: Parameter, wanted: OptionValue | None, default: OptionValue) -> OptionValue:
    """The choice equal to `wanted`, else of numbers the one at the smallest ratio, else the default."""
    if wanted is None:
        return default
    if wanted in parameter.choices:
        return parameter.choices[parameter.choices.index(wanted)]
    numbers = [choice for choice in parameter.choices if _is_number(choice)]
    if not _is_number(wanted) or not numbers:
        return default
    return min(numbers, key=lambda choice: abs(math.log(float(choice) / float(wanted))))


def _is_number(value: OptionValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
