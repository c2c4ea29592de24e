"""Measures trials on deployments that Ray places: the `TrialRunner` of real clusters and of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster import deployment as life
from cluster.engines.base import EngineBackend
from cluster.janitor import TaggedProcess, end_orphans
from cluster.placement import PlacementError, fit_together, plan_placement
from cluster.processes import ProcessId
from cluster.ray_deployment import RayDeployment, Site
from cluster.ray_session import RayCluster
from cluster.runner import Running, TrialHandle, TrialRequest
from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.outcome import Failure, FailureReason, Outcome
from search_spaces.serving import ServingConfig

PRESSURE_S = 1.0
"""A deployment that waits this long for its devices makes idle ones stop, one after the other."""
TURN_S = 0.02
CLOSE_GRACE_S = 10.0
SWEEP_LIMIT_S = 20.0
_PHASES = {
    life.Phase.PLACING: "placement",
    life.Phase.STARTING: "start",
    life.Phase.ROUTING: "start",
    life.Phase.IDLE: "start",
    life.Phase.MEASURING: "measure",
    life.Phase.STOPPING: "stop",
    life.Phase.STOPPED: "stop",
}


class RayTrialRunner:
    """See `cluster.runner.TrialRunner`. Several trials run at once where the pools hold their deployments.

    `backends` are the engines by name. `work_dir` (on a cluster: a folder that all nodes share) takes models, logs and
    hand-over files; what a trial leaves is in its `artifact_dir`. Not for use from several threads.
    """

    def __init__(
        self, *, study: str, backends: Mapping[str, EngineBackend], cluster: RayCluster, work_dir: Path
    ) -> None:
        self._backends = dict(backends)
        self._cluster = cluster
        self._site = Site(
            study=study, cluster=cluster, coordinator=ProcessId.of(os.getpid()), work_dir=work_dir.resolve()
        )
        self._deployments: list[RayDeployment] = []
        self._requests: dict[str, TrialRequest] = {}
        self._owners: dict[str, RayDeployment] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._began_s: dict[str, float] = {}
        self._count = 0
        self._closed = False
        self.ended_orphans = self._sweep()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, request: TrialRequest) -> TrialHandle:
        """Begin `request`; raises `InvalidValueError` for a trial that was started before or an unknown engine."""
        if self._closed:
            raise TunerError("the runner is closed; make a new one")
        if request.trial in self._requests:
            raise InvalidValueError(f"trial {request.trial!r} was started before; give each trial its own name")
        self._requests[request.trial] = request
        self._began_s[request.trial] = time.monotonic()
        self._turn()
        self._route(request)
        return TrialHandle(trial=request.trial, config_key=request.candidate.config.key)

    def poll(self, handle: TrialHandle) -> Running | Outcome:
        """State of the trial; raises `InvalidValueError` for one that was never started here."""
        if handle.trial not in self._requests:
            raise InvalidValueError(f"trial {handle.trial!r} is unknown to this runner; start it first")
        self._turn()
        if handle.trial in self._outcomes:
            return self._outcomes[handle.trial]
        return Running(phase=self._phase(handle.trial), elapsed_s=time.monotonic() - self._began_s[handle.trial])

    def stop(self, handle: TrialHandle) -> None:
        """End the trial and its deployment, and wait until its devices are free; a no-op when it has ended."""
        owner = self._owners.get(handle.trial)
        if handle.trial in self._outcomes or owner is None:
            return
        owner.stop(f"trial {handle.trial} was stopped before it was measured")
        self._wait_until_stopped([owner])

    def warm(self) -> tuple[ServingConfig, ...]:
        """Configurations whose deployments are up and idle, the one used last first."""
        self._turn()
        return tuple(deployment.config for deployment in reversed(self._idle()))

    def release(self) -> None:
        """Stop every idle deployment and wait until their devices are free."""
        self._turn()
        self._stop_all(self._idle(), "no longer wanted")

    def close(self) -> None:
        """Stop everything, the trials that run too, and wait for it."""
        self._closed = True
        self._stop_all(self._deployments, "the runner was closed before the trial was measured")
        end_orphans(self._site.study)

    def _sweep(self) -> tuple[TaggedProcess, ...]:
        """End what dead coordinators of the study left: on this host at once, on the others through Ray."""
        ended = end_orphans(self._site.study)
        if len(self._cluster.nodes()) > 1:
            swept = self._cluster.run_on_every_node(SWEEP_LIMIT_S, end_orphans, self._site.study)
            ended += [process for processes in swept.values() for process in processes]
        return tuple(ended)

    def processes(self) -> dict[str, dict[str, int]]:
        """Process ids by deployment and replica, of the deployments that are up."""
        return {deployment.name: deployment.pids for deployment in self._deployments}

    def _phase(self, trial: str) -> str:
        owner = self._owners.get(trial)
        return "placement" if owner is None else _PHASES[owner.state.phase]

    def _idle(self) -> list[RayDeployment]:
        """Idle deployments, the one used longest ago first."""
        return sorted((d for d in self._deployments if d.state.warm), key=lambda d: d.state.since_s)

    def _route(self, request: TrialRequest) -> None:
        """Give the trial to a deployment of its configuration, or start one."""
        config = request.candidate.config
        standing = next((d for d in self._deployments if d.state.alive and d.config == config), None)
        if standing is not None:
            self._owners[request.trial] = standing
            standing.ask(request)
            return
        try:
            self._owners[request.trial] = self._launch(request)
        except PlacementError as error:
            self._outcomes[request.trial] = Failure(reason=FailureReason.PLACEMENT, detail=str(error))

    def _launch(self, request: TrialRequest) -> RayDeployment:
        config = request.candidate.config
        backend = self._backends.get(config.engine)
        if backend is None:
            raise InvalidValueError(f"engine {config.engine!r} is unknown; choose {', '.join(self._backends)}")
        placement = plan_placement(config, request.problem)
        if placement.spanning:
            raise PlacementError(
                f"{', '.join(placement.spanning)} would be parts of replicas that span nodes, which engine "
                f"{config.engine} cannot here; use fewer devices per replica"
            )
        self._make_room(request)
        self._count += 1
        deployment = RayDeployment(
            name=f"{config.key}-{self._count}", request=request, placement=placement, backend=backend, site=self._site
        )
        self._deployments.append(deployment)
        return deployment

    def _make_room(self, request: TrialRequest) -> None:
        """Stop idle deployments, the one used longest ago first, until the pools and the client's cores have room."""
        standing = [d for d in self._deployments if d.state.alive]
        for idle in self._idle():
            configs = [*(d.config for d in standing), request.candidate.config]
            crowded = self._cluster.local and len(configs) > self._cluster.trials_at_once
            if not crowded and fit_together(configs, request.problem):
                return
            idle.stop("another configuration needs its devices")
            standing.remove(idle)

    def _turn(self) -> None:
        for deployment in list(self._deployments):
            deployment.turn()
            self._outcomes.update(deployment.outcomes)
            requeued, deployment.requeued = deployment.requeued, []
            if deployment.state.phase is life.Phase.STOPPED:
                self._deployments.remove(deployment)
            for trial in requeued:
                self._route(self._requests[trial])
        self._relieve_pressure()

    def _relieve_pressure(self) -> None:
        """Stop an idle deployment where one still waits: others, or the layout of the nodes, stand in its way."""
        now_s = time.monotonic()
        waiting = any(
            d.state.phase is life.Phase.PLACING and now_s - d.state.since_s > PRESSURE_S for d in self._deployments
        )
        ending = any(d.state.phase is life.Phase.STOPPING for d in self._deployments)
        idle = self._idle()
        if waiting and not ending and idle:
            idle[0].stop("another configuration waits for devices")

    def _stop_all(self, deployments: Iterable[RayDeployment], why: str) -> None:
        stopping = list(deployments)
        for deployment in stopping:
            deployment.stop(why)
        self._wait_until_stopped(stopping)

    def _wait_until_stopped(self, deployments: list[RayDeployment]) -> None:
        limits = [d.state.limits.stop_s for d in deployments]
        deadline_s = time.monotonic() + max(limits, default=0.0) + CLOSE_GRACE_S
        while time.monotonic() < deadline_s:
            self._turn()
            if all(d.state.phase is life.Phase.STOPPED for d in deployments):
                return
            time.sleep(TURN_S)
