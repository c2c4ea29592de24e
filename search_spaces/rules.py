"""Which configurations cannot run, and why: cheap checks that need no measurement and no prediction."""

from __future__ import annotations

from collections.abc import Sequence

from search_spaces.engines import engine_spec
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, Pool, ServingConfig


def infeasibility(candidate: Candidate, problem: Problem) -> str | None:
    """Why `candidate` cannot run for `problem`, with value, limit and remedy; None where nothing speaks against it."""
    reasons = (
        _context(problem),
        *(_pool(pool, problem) for pool in candidate.config.pools),
        *(_options(pool, candidate.config.engine, problem) for pool in candidate.config.pools),
        _hand_over(candidate.config),
        _room(candidate.config, problem),
    )
    return next((reason for reason in reasons if reason is not None), None)


def _context(problem: Problem) -> str | None:
    longest, limit = problem.workload.longest_context, problem.model.max_context
    if longest <= limit:
        return None
    return (
        f"the longest request has {longest} tokens (ISL + OSL), but {problem.model.name} holds {limit}; "
        "shorten the workload or choose a model with a longer context"
    )


def _pool(pool: Pool, problem: Problem) -> str | None:
    tp = pool.parallelism.tp
    for group in problem.model.layers:
        heads = group.attention.heads
        if heads % tp:
            fitting = [n for n in range(1, heads + 1) if heads % n == 0]
            return f"tp={tp} does not divide {heads} attention heads; choose one of {fitting}"
    if problem.model.num_layers < pool.parallelism.pp:
        return f"pp={pool.parallelism.pp} is more than the {problem.model.num_layers} layers; choose fewer stages"
    return None


def _options(pool: Pool, engine: str, problem: Problem) -> str | None:
    spec, options = engine_spec(engine), dict(pool.options)
    return (
        spec.conflict(options)
        or spec.parallel_conflict(pool.parallelism, options)
        or spec.workload_conflict(options, problem.workload)
    )


def _hand_over(config: ServingConfig) -> str | None:
    spec = engine_spec(config.engine)
    first = config.pools[0]
    for name in spec.shared_options:
        default = spec.parameter(name).default
        for pool in config.pools[1:]:
            mine, theirs = pool.option(name, default), first.option(name, default)
            if mine != theirs:
                return (
                    f"{name}={mine} of the {pool.role} pool differs from {theirs} of the {first.role} pool, so that "
                    f"{spec.name} could not hand KV caches over; give both pools the same"
                )
    return None


def _room(config: ServingConfig, problem: Problem) -> str | None:
    for node_pool in problem.node_pools:
        sizes = group_sizes(config, node_pool.name)
        if sizes and max(sizes) > node_pool.devices_per_node:
            return (
                f"{max(sizes)} devices must share a node, but a node of pool {node_pool.name!r} has "
                f"{node_pool.devices_per_node}; lower tp or use pp"
            )
        if not packs(sizes, node_pool.nodes, node_pool.devices_per_node):
            return (
                f"{sum(sizes)} devices are asked of pool {node_pool.name!r}, which cannot place them on "
                f"{node_pool.nodes} x {node_pool.devices_per_node}; use fewer or smaller replicas"
            )
    return None


def group_sizes(config: ServingConfig, node_pool: str) -> list[int]:
    """Sizes of the device groups that must stay on one node, for each pool of `config` on `node_pool`.

    A replica splits over nodes between its pipeline stages and between its data-parallel ranks, never inside a
    tensor-parallel group.
    """
    sizes: list[int] = []
    for pool in config.pools:
        if pool.node_pool == node_pool:
            groups = pool.replicas * pool.parallelism.pp * pool.parallelism.dp
            sizes += [pool.parallelism.tp * pool.devices_per_rank] * groups
    return sizes


def packs(sizes: Sequence[int], bins: int, capacity: int) -> bool:
    """True where first-fit decreasing puts `sizes` into `bins` bins of `capacity`."""
    free = [capacity] * bins
    for size in sorted(sizes, reverse=True):
        place = next((i for i, room in enumerate(free) if room >= size), None)
        if place is None:
            return False
        free[place] -= size
    return True
