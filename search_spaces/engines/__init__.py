"""The engines and what each lets one choose."""

from __future__ import annotations

from search_spaces.engines.base import EngineParameter, EngineSpec
from search_spaces.engines.emulated import EMULATED
from search_spaces.engines.llamacpp import LLAMACPP
from search_spaces.engines.sglang import SGLANG
from search_spaces.engines.trtllm import TRTLLM
from search_spaces.engines.vllm import VLLM
from search_spaces.errors import InvalidValueError

ENGINES: dict[str, EngineSpec] = {spec.name: spec for spec in (LLAMACPP, EMULATED, VLLM, SGLANG, TRTLLM)}


def engine_spec(name: str) -> EngineSpec:
    """The engine called `name`; raises `InvalidValueError` with the known names."""
    if name not in ENGINES:
        raise InvalidValueError(f"engine {name!r} is unknown; choose {', '.join(ENGINES)}")
    return ENGINES[name]


__all__ = ["ENGINES", "EngineParameter", "EngineSpec", "engine_spec"]
