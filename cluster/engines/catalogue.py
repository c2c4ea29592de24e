"""The backends of engines that live in an environment of their own, by name."""

from __future__ import annotations

from collections.abc import Callable

from cluster.engines.base import EngineBackend
from cluster.engines.installation import Installations
from cluster.engines.sglang import SglangBackend
from cluster.engines.trtllm import TrtllmBackend
from cluster.engines.vllm import VllmBackend


def _vllm(installations: Installations) -> EngineBackend:
    return VllmBackend(installations=installations)


def _sglang(installations: Installations) -> EngineBackend:
    return SglangBackend(installations=installations)


def _trtllm(installations: Installations) -> EngineBackend:
    return TrtllmBackend(installations=installations)


BACKENDS_APART: dict[str, Callable[[Installations], EngineBackend]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "trtllm": _trtllm,
}
