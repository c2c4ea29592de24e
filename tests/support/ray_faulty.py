"""llama.cpp with faults on request, for what a real engine does only on a bad day."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ray import cloudpickle

from cluster.engines.base import LaunchCommand, ReplicaSpec, RouterSpec
from cluster.engines.llamacpp import LlamaCppBackend
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import the tests

PROGRAMS = {
    "exits": "print('the flag --frobnicate is unknown', flush=True); raise SystemExit(64)",
    "hangs": "import time; print('loading for ever', flush=True); time.sleep(600)",
}


@dataclass(frozen=True)
class FaultyBackend:
    """The embedded engine, whose replicas run the program called `fault` instead."""

    fault: str
    name: str = "faulty"
    emulated: bool = False

    def prepare(self, model: ModelSpec, directory: Path) -> ModelSpec:
        return LlamaCppBackend().prepare(model, directory)

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        del replica
        if self.fault == "bug":
            raise ZeroDivisionError("a bug of the backend")
        return LaunchCommand(argv=(sys.executable, "-c", PROGRAMS[self.fault]))

    def router_command(self, router: RouterSpec) -> LaunchCommand:
        return LlamaCppBackend().router_command(router)

    def classify(self, exit_code: int | None, log_tail: str, *, ready: bool) -> FailureReason:
        return LlamaCppBackend().classify(exit_code, log_tail, ready=ready)

    def version(self) -> str:
        return "faulty 1"
