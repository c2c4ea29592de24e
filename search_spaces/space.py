"""The search space: a flat genotype for the sampler, decoded and repaired into a candidate.

Every parameter is present in every genotype, so that a sampler never meets a conditional one; those that do not apply
(the decode pool of an aggregated deployment, say) are ignored by `decode` and canonical in `encode`. Two genotypes that
decode to the same candidate share its key, and are measured once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from search_spaces.engines import engine_spec
from search_spaces.errors import InvalidValueError, require
from search_spaces.hardware import DeviceKind
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import (
    Candidate,
    Mode,
    Options,
    OptionValue,
    Parallelism,
    Pool,
    Role,
    ServingConfig,
    make_options,
)
from search_spaces.workload import Load

Genotype = dict[str, OptionValue]
PARALLEL_SIZES = ("tp", "pp", "dp", "ep")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One gene: its `choices`, which are `ordered` where neighbouring values are alike."""

    name: str
    choices: tuple[OptionValue, ...]
    ordered: bool

    def __post_init__(self) -> None:
        require(bool(self.choices), f"parameter {self.name} has no choices; give at least one")
        require(
            len(set(self.choices)) == len(self.choices),
            f"choices {list(self.choices)} of {self.name} repeat; give each once",
        )

    def adjacent(self, value: OptionValue) -> tuple[OptionValue, ...]:
        """The values one step from `value`: the next ones of an ordered parameter, all others of another."""
        if not self.ordered:
            return tuple(choice for choice in self.choices if choice != value)
        at = self.choices.index(value)
        return self.choices[max(0, at - 1) : at] + self.choices[at + 1 : at + 2]


@dataclass(frozen=True, kw_only=True)
class RoleChoices:
    """What may be chosen for the pool in one role; `options` maps an option name to its values."""

    node_pools: tuple[str, ...]
    replicas: tuple[int, ...] = (1,)
    tp: tuple[int, ...] = (1,)
    pp: tuple[int, ...] = (1,)
    dp: tuple[int, ...] = (1,)
    ep: tuple[int, ...] = (1,)
    options: Mapping[str, tuple[OptionValue, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Space:
    """All candidates of a study.

    `loads` are concurrencies or request rates, as the workload's arrival says. `roles` holds the choices of every role
    of `modes`.
    """

    problem: Problem
    engines: tuple[str, ...]
    modes: tuple[Mode, ...]
    roles: Mapping[Role, RoleChoices]
    loads: tuple[float, ...]

    def __post_init__(self) -> None:
        require(bool(self.engines), "the space has no engine; give at least one")
        require(bool(self.modes), "the space has no serving mode; choose aggregated, disaggregated or both")
        require(bool(self.loads), "the space has no load; give at least one concurrency or request rate")
        for mode in self.modes:
            missing = [str(role) for role in mode.roles if role not in self.roles]
            require(not missing, f"mode {mode} needs choices for {missing}")

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The genes: every parameter with more than one choice, in a stable order."""
        return tuple(parameter for parameter in self._known.values() if len(parameter.choices) > 1)

    @cached_property
    def _known(self) -> dict[str, Parameter]:
        """Every gene by name, those with a single choice included."""
        return {parameter.name: parameter for parameter in self._all_parameters()}

    @property
    def size(self) -> int:
        """Number of genotypes; candidates are fewer, since repaired genotypes coincide."""
        return math.prod(len(parameter.choices) for parameter in self.parameters)

    def _all_parameters(self) -> Iterator[Parameter]:
        yield Parameter(name="engine", choices=self.engines, ordered=False)
        yield Parameter(name="mode", choices=tuple(str(mode) for mode in self.modes), ordered=False)
        for mode in self.modes:
            for role in mode.roles:
                yield from self._role_parameters(role)
        yield Parameter(name=self.load_name, choices=self.loads, ordered=True)

    def _role_parameters(self, role: Role) -> Iterator[Parameter]:
        choices = self.roles[role]
        yield Parameter(name=f"{role}.node_pool", choices=choices.node_pools, ordered=False)
        for name in ("replicas", *PARALLEL_SIZES):
            yield Parameter(name=f"{role}.{name}", choices=getattr(choices, name), ordered=True)
        for name, values in sorted(choices.options.items()):
            ordered = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
            yield Parameter(name=f"{role}.{name}", choices=values, ordered=ordered)

    @property
    def load_name(self) -> str:
        """Name of the load's gene: `concurrency` or `request_rate`."""
        return self.problem.workload.arrival.load_unit

    def decode(self, genotype: Mapping[str, OptionValue]) -> Candidate:
        """The candidate that `genotype` stands for, repaired where a repair is known.

        Genes of single-choice parameters may be left out. Raises `InvalidValueError` for an unknown gene or value.
        """
        genes = self._complete(genotype)
        engine, mode = str(genes["engine"]), Mode(str(genes["mode"]))
        config = self._fit(ServingConfig(engine=engine, pools=self._decode_pools(mode, engine, genes)))
        load = Load(arrival=self.problem.workload.arrival, value=float(genes[self.load_name]))
        return Candidate(config=config, load=load)

    def _complete(self, genotype: Mapping[str, OptionValue]) -> Genotype:
        known = self._known
        for name, value in genotype.items():
            if name not in known:
                raise InvalidValueError(f"parameter {name!r} is unknown; choose one of {', '.join(known)}")
            if value not in known[name].choices:
                raise InvalidValueError(f"{name}={value!r} is no choice; choose one of {list(known[name].choices)}")
        return {name: genotype.get(name, parameter.choices[0]) for name, parameter in known.items()}

    def _decode_pools(self, mode: Mode, engine: str, genes: Genotype) -> tuple[Pool, ...]:
        """A pool for each role; options that the hand-over of KV caches wants alike are those of the first."""
        first = self._decode_pool(mode.roles[0], engine, genes)
        shared = {name: first.option(name) for name in engine_spec(engine).shared_options if len(mode.roles) > 1}
        others = (
            self._decode_pool(role, engine, genes | {f"{role}.{name}": value for name, value in shared.items()})
            for role in mode.roles[1:]
        )
        return (first, *others)

    def _decode_pool(self, role: Role, engine: str, genes: Genotype) -> Pool:
        sizes = {name: int(genes[f"{role}.{name}"]) for name in PARALLEL_SIZES}
        ranks = sizes["tp"] * sizes["dp"]
        sizes["ep"] = max((n for n in self.roles[role].ep if n <= sizes["ep"] and ranks % n == 0), default=1)
        values = {name: genes[f"{role}.{name}"] for name in self.roles[role].options}
        node_pool = str(genes[f"{role}.node_pool"])
        kind = self.problem.node_pool(node_pool).device.kind
        options = self._decode_options(role, engine, values, kind)
        return Pool(
            role=role,
            node_pool=node_pool,
            replicas=int(genes[f"{role}.replicas"]),
            parallelism=Parallelism(**sizes),
            devices_per_rank=_devices_per_rank(engine, dict(options)),
            options=options,
        )

    def _decode_options(self, role: Role, engine: str, values: Genotype, kind: DeviceKind) -> Options:
        spec = engine_spec(engine)
        chosen: Genotype = {}
        for parameter in spec.parameters_of(role, (kind,)):
            value = values.get(parameter.name, parameter.default)
            chosen[parameter.name] = value if parameter.accepts(value) else parameter.default  # another engine's value
        return make_options(spec.repair(chosen))

    def _fit(self, config: ServingConfig) -> ServingConfig:
        """Lower replica counts, largest pool first, until the pools have room; unchanged where that is not enough."""
        fitted = config
        while self._lacks_room(fitted):
            shrunk = self._fewer_replicas(fitted)
            if shrunk is None:
                return config
            fitted = shrunk
        return fitted

    def _lacks_room(self, config: ServingConfig) -> bool:
        by_pool = {pool.name: pool.devices for pool in self.problem.node_pools}
        return any(
            sum(pool.devices for pool in config.pools if pool.node_pool == name) > room
            for name, room in by_pool.items()
        )

    def _fewer_replicas(self, config: ServingConfig) -> ServingConfig | None:
        shrinkable = [pool for pool in config.pools if pool.replicas > min(self.roles[pool.role].replicas)]
        if not shrinkable:
            return None
        largest = max(shrinkable, key=lambda pool: pool.devices)
        fewer = max(n for n in self.roles[largest.role].replicas if n < largest.replicas)
        pools = tuple(replace(pool, replicas=fewer) if pool is largest else pool for pool in config.pools)
        return replace(config, pools=pools)

    def encode(self, candidate: Candidate) -> Genotype:
        """The canonical genotype of `candidate`: `decode(encode(c)) == c` for every decoded `c`."""
        config = candidate.config
        genes = dict(self._blank)
        genes |= {"engine": config.engine, "mode": str(config.mode), self.load_name: candidate.load.value}
        for pool in config.pools:
            genes |= self._encode_pool(pool)
        return {parameter.name: _nearest(genes[parameter.name], parameter.choices) for parameter in self.parameters}

    @cached_property
    def _blank(self) -> Genotype:
        """The genes of roles that a candidate does not have: first choices, and defaults of options."""
        genes = self._complete({})
        for role, choices in self.roles.items():
            genes |= {f"{role}.{name}": self._default_choice(role, name) for name in choices.options}
        return genes

    def _encode_pool(self, pool: Pool) -> Genotype:
        genes: Genotype = {f"{pool.role}.node_pool": pool.node_pool, f"{pool.role}.replicas": pool.replicas}
        genes |= {f"{pool.role}.{name}": getattr(pool.parallelism, name) for name in PARALLEL_SIZES}
        offered = self.roles[pool.role].options
        genes |= {f"{pool.role}.{name}": value for name, value in pool.options if name in offered}
        return genes

    def _default_choice(self, role: Role, name: str) -> OptionValue:
        """The engine's own default where it is among the choices, else the first choice."""
        choices = self.roles[role].options[name]
        for engine in self.engines:
            for parameter in engine_spec(engine).parameters_of(role):
                if parameter.name == name and parameter.default in choices:
                    return parameter.default
        return choices[0]

    def default(self, mode: Mode | None = None, engine: str | None = None) -> Candidate:
        """The engine's default configuration in `mode` (the first mode unless given), at the middle load.

        One replica (or the fewest allowed) with the smallest parallelism that `rules` admits. An option whose default
        is not among the study's choices takes its first choice.
        """
        chosen = mode or self.modes[0]
        base: Genotype = {"engine": engine or self.engines[0], "mode": str(chosen)}
        base[self.load_name] = self.loads[len(self.loads) // 2]
        for role in chosen.roles:
            base |= {f"{role}.{name}": self._default_choice(role, name) for name in self.roles[role].options}
            base |= {f"{role}.replicas": min(self.roles[role].replicas)}
        return self._smallest_feasible(base, chosen)

    def _smallest_feasible(self, base: Genotype, mode: Mode) -> Candidate:
        first = self.decode(base)
        for tp in self.roles[mode.roles[0]].tp:
            genes = base | {f"{role}.tp": tp for role in mode.roles if tp in self.roles[role].tp}
            candidate = self.decode(genes)
            if infeasibility(candidate, self.problem) is None:
                return candidate
        return first

    def neighbours(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """The distinct candidates that differ from `candidate` in one gene by one step."""
        genotype = self.encode(candidate)
        found = {
            other.key: other
            for parameter in self.parameters
            for value in parameter.adjacent(genotype[parameter.name])
            for other in (self.decode(genotype | {parameter.name: value}),)
        }
        found.pop(candidate.key, None)
        return tuple(found.values())

    def same_config(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """The same deployment under every other load of the space."""
        loads = (Load(arrival=candidate.load.arrival, value=float(value)) for value in self.loads)
        return tuple(replace(candidate, load=load) for load in loads if load != candidate.load)

    def sample(self, rng: random.Random) -> Candidate:
        """A candidate drawn gene by gene."""
        return self.decode({parameter.name: rng.choice(parameter.choices) for parameter in self.parameters})


def _nearest(value: OptionValue, choices: tuple[OptionValue, ...]) -> OptionValue:
    """The choice equal to `value`; for a value that a repair has moved off the choices, the next one above it.

    Repairs only lower a number or switch an option on, so that this choice is repaired to the same value again.
    """
    if value in choices:
        return choices[choices.index(value)]
    above = [choice for choice in choices if not isinstance(choice, str) and float(choice) >= float(value)]
    return min(above, default=choices[0])


def _devices_per_rank(engine: str, options: Mapping[str, OptionValue]) -> int:
    name = engine_spec(engine).devices_per_rank_option
    return 1 if name is None or name not in options else int(options[name])


def build_space(
    problem: Problem,
    *,
    engines: Mapping[str, Mapping[str, tuple[OptionValue, ...]]],
    loads: tuple[float, ...],
    modes: tuple[Mode, ...] = tuple(Mode),
    roles: Mapping[Role, RoleChoices] | None = None,
) -> Space:
    """The space of a study.

    `engines` maps each engine to the options to search and their values; an option that is not named is searched over
    the engine's own choices, or keeps its default where it is none of those `searched`; one with a single value is
    fixed. `roles` says where replicas may run and how many; by default one replica on any node pool. Raises
    `InvalidValueError` for an option that an engine does not have or values outside its choices.
    """
    node_pools = tuple(pool.name for pool in problem.node_pools)
    base = roles or {}
    needed = [role for mode in modes for role in mode.roles]
    filled = {
        role: replace(
            base.get(role, RoleChoices(node_pools=node_pools)),
            options=_merged_options(engines, role, _kinds(problem, base.get(role)))
            | dict(base[role].options if role in base else {}),
        )
        for role in needed
    }
    return Space(problem=problem, engines=tuple(engines), modes=modes, roles=filled, loads=loads)


def _kinds(problem: Problem, choices: RoleChoices | None) -> tuple[DeviceKind, ...]:
    names = [pool.name for pool in problem.node_pools] if choices is None else choices.node_pools
    return tuple({problem.node_pool(name).device.kind for name in names})


def _merged_options(
    engines: Mapping[str, Mapping[str, tuple[OptionValue, ...]]], role: Role, kinds: tuple[DeviceKind, ...]
) -> dict[str, tuple[OptionValue, ...]]:
    """Union over the engines of the values of every option that applies in `role`."""
    merged: dict[str, tuple[OptionValue, ...]] = {}
    for engine, chosen in engines.items():
        spec = engine_spec(engine)
        for name, values in chosen.items():
            _check_values(engine, name, values)
        for parameter in spec.parameters_of(role, kinds):
            values = chosen.get(parameter.name, parameter.searched_choices)
            merged[parameter.name] = tuple(dict.fromkeys(merged.get(parameter.name, ()) + tuple(values)))
    return merged


def _check_values(engine: str, name: str, values: tuple[OptionValue, ...]) -> None:
    parameter = engine_spec(engine).parameter(name)
    for value in values:
        if not parameter.accepts(value):
            raise InvalidValueError(
                f"{engine} option {name}={value!r} is outside its limits; choose from {list(parameter.choices)}"
            )
