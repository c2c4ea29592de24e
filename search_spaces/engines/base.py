"""What an engine lets one choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from search_spaces.errors import InvalidValueError, require
from search_spaces.hardware import DeviceKind
from search_spaces.serving import OptionValue, Parallelism, Role
from search_spaces.workload import Workload

ALL_ROLES = (Role.MIXED, Role.PREFILL, Role.DECODE)
SPLIT_ROLES = (Role.PREFILL, Role.DECODE)
ALL_KINDS = (DeviceKind.GPU, DeviceKind.CPU)
OptionValues = dict[str, OptionValue]


@dataclass(frozen=True, kw_only=True)
class EngineParameter:
    """One option of an engine: its sound values in order, the engine's own default, unit and meaning.

    It applies to replicas in `roles` on devices of `kinds`. One that is not `searched` keeps its default unless the
    study names it. One that changes `numerics` changes what the model answers: a study compares its values only where
    it says so.
    """

    name: str
    choices: tuple[OptionValue, ...]
    default: OptionValue
    unit: str
    meaning: str
    roles: tuple[Role, ...] = ALL_ROLES
    kinds: tuple[DeviceKind, ...] = ALL_KINDS
    searched: bool = True
    numerics: bool = False

    def __post_init__(self) -> None:
        require(
            self.default in self.choices,
            f"default {self.default!r} of {self.name} is not among its choices {list(self.choices)}",
        )

    @cached_property
    def is_number(self) -> bool:
        """True where the choices are points of a numeric range."""
        return all(isinstance(choice, (int, float)) and not isinstance(choice, bool) for choice in self.choices)

    @property
    def searched_choices(self) -> tuple[OptionValue, ...]:
        """The values that a study searches which does not name the option."""
        return self.choices if self.searched else (self.default,)

    def accepts(self, value: OptionValue) -> bool:
        """True for a choice, and for any number of the same kind inside the range of a numeric parameter."""
        if not self.is_number or isinstance(value, (bool, str)):
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        low, high, whole = self._range
        return low <= value <= high and (not whole or isinstance(value, int))

    @cached_property
    def _range(self) -> tuple[float, float, bool]:
        """Least and greatest number, and whether all are whole."""
        numbers = [float(choice) for choice in self.choices]
        return min(numbers), max(numbers), all(isinstance(choice, int) for choice in self.choices)


def _no_repair(options: Mapping[str, OptionValue]) -> OptionValues:
    return dict(options)


def _no_conflict(_options: Mapping[str, OptionValue]) -> str | None:
    return None


def _any_parallelism(_sizes: Parallelism, _options: Mapping[str, OptionValue]) -> str | None:
    return None


def _any_workload(_options: Mapping[str, OptionValue], _workload: Workload) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """Names of the options that say how an engine fills its steps: what a performance model reads of them.

    `sequences` of a rank that run together, `step_tokens` that a step may hold, `memory_share` of a device for weights
    and KV cache, `reuses_prompts` whether earlier prompts' blocks are used again, or `forgets_prompts` whether they are
    not, `splits_prompts` whether they are computed in parts. None where the engine has no such option.
    """

    sequences: str | None = None
    step_tokens: str | None = None
    memory_share: str | None = None
    reuses_prompts: str | None = None
    forgets_prompts: str | None = None
    splits_prompts: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Everything that may be chosen of an engine.

    `devices_per_rank_option` names the option that says how many devices (cores) one rank takes, None for one.
    `repair` mends a combination of options that the engine would refuse; `conflict` says why it would refuse one,
    `parallel_conflict` why it would refuse parallel sizes with them, `workload_conflict` why it could not serve a load.
    `shared_options` must be the same in a prefill and a decode pool: the hand-over of KV caches depends on them.
    `emulated` engines compute nothing: they only take the time that a performance model says. `devices` are the kinds
    that the engine runs on. An engine that is `apart` lives in an environment of its own, where a command starts it.
    `scheduling` names the options by which it fills its steps.
    """

    name: str
    parameters: tuple[EngineParameter, ...]
    roles: tuple[Role, ...] = ALL_ROLES
    devices_per_rank_option: str | None = None
    repair: Callable[[Mapping[str, OptionValue]], OptionValues] = _no_repair
    conflict: Callable[[Mapping[str, OptionValue]], str | None] = _no_conflict
    parallel_conflict: Callable[[Parallelism, Mapping[str, OptionValue]], str | None] = _any_parallelism
    workload_conflict: Callable[[Mapping[str, OptionValue], Workload], str | None] = _any_workload
    shared_options: tuple[str, ...] = ()
    emulated: bool = False
    apart: bool = False
    scheduling: Scheduling = Scheduling()
    devices: tuple[DeviceKind, ...] = (DeviceKind.CPU,)

    def parameter(self, name: str) -> EngineParameter:
        """The parameter called `name`; raises `InvalidValueError` with the known names."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = ", ".join(p.name for p in self.parameters)
        raise InvalidValueError(f"engine {self.name} has no option {name!r}; choose {known}")

    def parameters_of(self, role: Role, kinds: tuple[DeviceKind, ...] = ALL_KINDS) -> tuple[EngineParameter, ...]:
        """The parameters that apply in `role` on devices of one of `kinds`."""
        known = self._applying.get((role, kinds))
        if known is None:
            known = tuple(p for p in self.parameters if role in p.roles and set(kinds) & set(p.kinds))
            self._applying[role, kinds] = known
        return known

    @cached_property
    def _applying(self) -> dict[tuple[Role, tuple[DeviceKind, ...]], tuple[EngineParameter, ...]]:
        """What `parameters_of` has found: it is asked for every candidate of a proposal."""
        return {}
