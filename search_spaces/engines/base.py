"""What an engine lets one choose."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.errors import InvalidValueError, require
from search_spaces.serving import OptionValue, Role

ALL_ROLES = (Role.MIXED, Role.PREFILL, Role.DECODE)


@dataclass(frozen=True, kw_only=True)
class EngineParameter:
    """One option of an engine: its sound values in order, the engine's own default, unit and meaning."""

    name: str
    choices: tuple[OptionValue, ...]
    default: OptionValue
    unit: str
    meaning: str
    roles: tuple[Role, ...] = ALL_ROLES

    def __post_init__(self) -> None:
        require(
            self.default in self.choices,
            f"default {self.default!r} of {self.name} is not among its choices {list(self.choices)}",
        )


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Everything that may be chosen of an engine.

    `devices_per_rank_option` names the option that says how many devices (cores) one rank takes, None for one.
    """

    name: str
    parameters: tuple[EngineParameter, ...]
    roles: tuple[Role, ...] = ALL_ROLES
    devices_per_rank_option: str | None = None

    def parameter(self, name: str) -> EngineParameter:
        """The parameter called `name`; raises `InvalidValueError` with the known names."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = ", ".join(p.name for p in self.parameters)
        raise InvalidValueError(f"engine {self.name} has no option {name!r}; choose {known}")

    def parameters_of(self, role: Role) -> tuple[EngineParameter, ...]:
        """The parameters that apply in `role`."""
        return tuple(p for p in self.parameters if role in p.roles)
