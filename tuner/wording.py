"""How candidates and metrics are written for people and for JSON."""

from __future__ import annotations

from search_spaces.engines import engine_spec
from search_spaces.metrics import METRICS, Direction
from search_spaces.serving import Candidate, Pool, Role
from search_spaces.slos import Slo
from studies.codec import Json

_ROLE_LETTER = {Role.MIXED: "", Role.PREFILL: "P", Role.DECODE: "D"}


def number(value: float) -> str:
    """`value` with three significant digits, without exponents for everyday sizes."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """`seconds` as 45 s, 3 min 20 s or 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def metric_label(name: str) -> str:
    """Name, unit and better direction, such as `ttft_p99_ms (lower is better)`."""
    better = "lower" if METRICS[name].direction is Direction.MINIMIZE else "higher"
    return f"{name} ({METRICS[name].unit}, {better} is better)"


def slo_text(slo: Slo) -> str:
    """An SLO in words, such as `ttft_p95_ms at most 500 (soft, weight 0.5, steepness 1)`."""
    bound = "at most" if METRICS[slo.metric].direction is Direction.MINIMIZE else "at least"
    shape = f"weight {slo.weight:g}, steepness {slo.steepness:g}"
    kind = f"soft, {shape}" if not slo.hard else f"hard, up to {slo.fail_ratio:.0%} over, {shape}"
    plain = slo.hard and slo.fail_ratio == 0
    return f"{slo.metric} {bound} {number(slo.threshold)}{'' if plain else f' ({kind})'}"


def pools_text(candidate: Candidate, *, separator: str = " + ") -> str:
    """The pools in a line: replicas, devices of each, and the options that differ from the engine's default."""
    return separator.join(_pool_text(pool, candidate.config.engine) for pool in candidate.config.pools)


def _pool_text(pool: Pool, engine: str) -> str:
    sizes = [f"{name}{size}" for name, size in _sizes(pool).items() if size > 1]
    spec = engine_spec(engine)
    defaults = {parameter.name: parameter.default for parameter in spec.parameters}
    options = [f"{name}={_shown(value)}" for name, value in pool.options if value != defaults.get(name)]
    inside = " ".join((*sizes, *options)) or "defaults"
    on_gpus = f"{pool.node_pool} " if spec.devices_per_rank_option is None else ""  # GPU types differ, cores do not
    return f"{pool.replicas}{_ROLE_LETTER[pool.role]} x {on_gpus}[{inside}]"


def _sizes(pool: Pool) -> dict[str, int]:
    parallel = pool.parallelism
    return {"tp": parallel.tp, "pp": parallel.pp, "dp": parallel.dp, "ep": parallel.ep}


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def candidate_text(candidate: Candidate) -> str:
    """Mode, pools and load in a line."""
    return f"{candidate.config.mode} {pools_text(candidate)} at {candidate.load}"


def rate_text(met: float | None, missed: float | None) -> str:
    """The interval of a highest request rate: a rate that was met and one that was not, None for none."""
    if met is None:
        return f"below {number(missed)}/s" if missed is not None else "not known"
    return f"at least {number(met)}/s" if missed is None else f"{number(met)} to {number(missed)}/s"


def repeats_text(count: int) -> str:
    """So many repeats."""
    return f"{count} repeat" if count == 1 else f"{count} repeats"


def candidate_json(candidate: Candidate) -> dict[str, Json]:
    """The candidate as plain JSON for readers: options are a mapping and the load has its unit as key."""
    return {
        "engine": candidate.config.engine,
        "mode": str(candidate.config.mode),
        "devices": candidate.config.devices,
        "pools": [_pool_json(pool) for pool in candidate.config.pools],
        candidate.load.arrival.load_unit: candidate.load.value,
        "arrival": str(candidate.load.arrival),
    }


def _pool_json(pool: Pool) -> Json:
    sizes: dict[str, Json] = dict(_sizes(pool))
    options: dict[str, Json] = dict(pool.options)
    return {
        "role": str(pool.role),
        "node_pool": pool.node_pool,
        "replicas": pool.replicas,
        **sizes,
        "devices_per_replica": pool.devices_per_replica,
        "options": options,
    }
