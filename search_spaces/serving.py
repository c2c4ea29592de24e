"""A serving configuration: what is deployed, on which nodes, and under which load it is judged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from search_spaces.errors import InvalidValueError, require
from search_spaces.workload import Load

OptionValue = str | int | float | bool
Options = tuple[tuple[str, OptionValue], ...]


class Role(StrEnum):
    """What the replicas of a pool do."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class Mode(StrEnum):
    """Serving mode: one pool for both phases, or a pool for each."""

    AGGREGATED = "aggregated"
    DISAGGREGATED = "disaggregated"

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of the pools of this mode, in order."""
        return (Role.MIXED,) if self is Mode.AGGREGATED else (Role.PREFILL, Role.DECODE)


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Tensor, pipeline, attention-data and expert parallel sizes of one replica; experts reuse the ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for label in ("tp", "pp", "dp", "ep"):
            value = getattr(self, label)
            require(value >= 1, f"{label}={value} must be at least 1")
        require(
            (self.tp * self.dp) % self.ep == 0,
            f"ep={self.ep} does not divide tp*dp={self.tp * self.dp}; choose a divisor",
        )

    @property
    def ranks(self) -> int:
        """Engine ranks of one replica."""
        return self.tp * self.pp * self.dp


def make_options(values: dict[str, OptionValue]) -> Options:
    """Engine options in canonical (sorted) order."""
    return tuple(sorted(values.items()))


@dataclass(frozen=True, kw_only=True)
class Pool:
    """`replicas` identical engine replicas in one role on one node pool.

    `devices_per_rank` is 1 on GPUs; on a CPU pool it is the threads (cores) of the replica.
    """

    role: Role
    node_pool: str
    replicas: int = 1
    parallelism: Parallelism = Parallelism()
    devices_per_rank: int = 1
    options: Options = ()

    def __post_init__(self) -> None:
        require(self.replicas >= 1, f"replicas={self.replicas} of the {self.role} pool must be at least 1")
        require(self.devices_per_rank >= 1, f"devices_per_rank={self.devices_per_rank} must be at least 1")
        require(self.options == tuple(sorted(self.options)), "options must be sorted by name; use make_options()")

    @property
    def devices_per_replica(self) -> int:
        """Devices that one replica reserves."""
        return self.parallelism.ranks * self.devices_per_rank

    @property
    def devices(self) -> int:
        """Devices that the pool reserves."""
        return self.replicas * self.devices_per_replica

    def option(self, name: str, default: OptionValue | None = None) -> OptionValue:
        """Value of engine option `name`; raises `InvalidValueError` when it is neither set nor given a default."""
        value = dict(self.options).get(name, default)
        if value is None:
            known = ", ".join(key for key, _ in self.options) or "none"
            raise InvalidValueError(f"the {self.role} pool has no option {name!r}; it has {known}")
        return value


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """One deployment: an engine and its pools.

    Aggregated is one MIXED pool, disaggregated a PREFILL and a DECODE pool.
    """

    engine: str
    pools: tuple[Pool, ...]

    def __post_init__(self) -> None:
        roles = tuple(pool.role for pool in self.pools)
        require(
            roles in {mode.roles for mode in Mode},
            f"pools with roles {[str(r) for r in roles]} are no deployment; give [mixed] or [prefill, decode]",
        )

    @property
    def mode(self) -> Mode:
        """The serving mode."""
        return Mode.AGGREGATED if len(self.pools) == 1 else Mode.DISAGGREGATED

    @property
    def devices(self) -> int:
        """Devices reserved by all pools."""
        return sum(pool.devices for pool in self.pools)

    def pool(self, role: Role) -> Pool:
        """The pool in `role`; raises `InvalidValueError` when the mode has none."""
        for pool in self.pools:
            if pool.role is role:
                return pool
        raise InvalidValueError(f"a {self.mode} deployment has no {role} pool")

    @cached_property
    def key(self) -> str:
        """Canonical key: equal configurations, and only they, share it."""
        return canonical_key(self)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a trial measures: a deployment under a load."""

    config: ServingConfig
    load: Load

    @cached_property
    def key(self) -> str:
        """Canonical key of configuration and load."""
        return canonical_key(self)


def canonical_key(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_fields_of)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fields_of(value: object) -> dict[str, object]:
    """The fields of a dataclass, by name: `asdict` without its copies, which cost most of a key."""
    names: dict[str, object] = getattr(value, "__dataclass_fields__")  # noqa: B009 - of any dataclass
    return {name: getattr(value, name) for name in names}
