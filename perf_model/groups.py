"""What is common to groups of candidates that are predicted as arrays."""

from __future__ import annotations

from dataclasses import dataclass

from perf_model.numeric import FloatArray
from perf_model.serving import ServingEstimate
from search_spaces.engines import engine_spec
from search_spaces.serving import OptionValue, Pool
from search_spaces.workload import Workload


@dataclass(frozen=True, kw_only=True)
class GroupAnswer:
    """What is predicted of a group: serving, requests per second of the deployment, a decode step by operation.

    `breakdown_ms` is not a number where a candidate's replicas have no such operation. `refused` says why a candidate
    cannot run, None where it can. `roofline_share` is the share of a decode step's time that no table backs.
    """

    estimate: ServingEstimate
    requests_per_s: FloatArray
    breakdown_ms: dict[str, FloatArray]
    refused: list[str | None]
    roofline_share: FloatArray | float = 1.0

    def backing(self, index: int) -> float:
        """`roofline_share` of one candidate."""
        share = self.roofline_share
        return share if isinstance(share, float) else float(share[index])


def option(engine: str, pool: Pool, name: str) -> OptionValue:
    """The pool's value of an engine option, the engine's own default where it is not set."""
    return pool.option(name, engine_spec(engine).parameter(name).default)


def burst_share(workload: Workload) -> float:
    """Share of the measured requests that are sent by all users at once.

    Users who start together stay together while lengths do not vary, and lose each other within some tens of steps of
    spread (measured after a warm-up of one wave).
    """
    steps_of_spread = workload.osl.longest - workload.osl.shortest
    return 1.0 / (1.0 + steps_of_spread / 4.0)
