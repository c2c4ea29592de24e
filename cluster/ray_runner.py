"""Measures trials on deployments that Ray places: the `TrialRunner` of real clusters and of this machine."""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from cluster import deployment as life
from cluster.engines.base import EngineBackend, PerDeployment, SpansNodes
from cluster.janitor import TaggedProcess, coordinators_of, dead_among, end_orphans, end_processes_of
from cluster.placement import Bundle, Placement, PlacementError, fit_together, missing_nodes, plan_placement
from cluster.processes import ProcessId, node_folder, remove_left_folders
from cluster.ray_deployment import RayDeployment
from cluster.ray_nodes import NodeWatch, WatchRule
from cluster.ray_session import RayCluster
from cluster.ray_site import Site
from cluster.runner import Running, TrialHandle, TrialRequest
from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.outcome import Failure, FailureReason, Outcome
from search_spaces.serving import ServingConfig

PRESSURE_S = 1.0
"""A deployment that waits this long for its devices makes idle ones stop, one after the other."""
MOST_OVERTAKEN = 8
"""Trials that may start before one that came earlier and needs more devices than are free; then it is its turn."""
TURN_S = 0.005
PAUSE_S = 0.02
KEPT_OUTCOMES = 256
CLOSE_GRACE_S = 10.0
SWEEP_LIMIT_S = 20.0
Found = TypeVar("Found")
_PHASES = {
    life.Phase.PLACING: "placement",
    life.Phase.STARTING: "start",
    life.Phase.ROUTING: "start",
    life.Phase.IDLE: "start",
    life.Phase.MEASURING: "measure",
    life.Phase.STOPPING: "stop",
    life.Phase.STOPPED: "stop",
}


class CannotSpanError(PlacementError):
    """A replica would span nodes in a way that its engine cannot: the configuration's fault, not the cluster's."""


@dataclass(kw_only=True)
class _Trial:
    """A trial without an outcome; `owner` is the deployment that it waits for or runs on, None while it queues.

    `possible` says that its pools could hold it with all their nodes; `short_since_s` is since when they have had too
    few nodes for it, None while they have enough.
    """

    request: TrialRequest
    began_s: float
    owner: RayDeployment | None = None
    overtaken: int = 0
    possible: bool = False
    short_since_s: float | None = None

    @property
    def node_pools(self) -> set[str]:
        """Those that its deployment runs on."""
        return {pool.node_pool for pool in self.request.candidate.config.pools}

    @property
    def phase(self) -> str:
        return "placement" if self.owner is None else _PHASES[self.owner.state.phase]


def routed(queued: Sequence[_Trial], route: Callable[[_Trial], bool]) -> Iterator[_Trial]:
    """Those of `queued`, in the order of their arrival, that `route` starts: it answers False where devices are busy.

    A trial that was overtaken `MOST_OVERTAKEN` times keeps its node pools for itself; others' pools are none of its
    business.
    """
    passed: list[_Trial] = []
    kept: set[str] = set()
    for trial in queued:
        if trial.node_pools & kept:
            continue
        if route(trial):
            for earlier in passed:
                earlier.overtaken += bool(earlier.node_pools & trial.node_pools)
            yield trial
        elif trial.overtaken >= MOST_OVERTAKEN and trial.short_since_s is None:
            kept |= trial.node_pools
        else:
            passed.append(trial)


class RayTrialRunner:
    """See `cluster.runner.TrialRunner`. Several trials run at once where the pools hold their deployments.

    A trial whose devices are taken by busy deployments queues here, for as long as those are busy; its limit of
    placement counts from when the pools have room. Smaller ones may overtake it, at most `MOST_OVERTAKEN`.

    `backends` are the engines by name. `work_dir` takes models, logs and hand-over files; nodes that do not see it
    use a temporary folder of their own, and what a trial leaves is in its `artifact_dir`, here. `rule` says how the
    nodes are watched. Not for use from several threads.
    """

    def __init__(
        self,
        *,
        study: str,
        backends: Mapping[str, EngineBackend],
        cluster: RayCluster,
        work_dir: Path,
        rule: WatchRule | None = None,
    ) -> None:
        self._backends = dict(backends)
        self._cluster = cluster
        coordinator = ProcessId.of(os.getpid())
        self._watch = NodeWatch(cluster=cluster, study=study, coordinator=coordinator, rule=rule)
        self._site = Site(
            study=study,
            cluster=cluster,
            coordinator=coordinator,
            work_dir=work_dir.resolve(),
            api_key=secrets.token_urlsafe(24),
            watch=self._watch,
        )
        self._deployments: list[RayDeployment] = []
        self._known: set[str] = set()
        self._running: dict[str, _Trial] = {}
        self._queue: list[str] = []
        self._outcomes: dict[str, Outcome] = {}
        self._told: deque[str] = deque()
        self._turned_s = 0.0
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
        if request.trial in self._known:
            raise InvalidValueError(f"trial {request.trial!r} was started before; give each trial its own name")
        if request.candidate.config.engine not in self._backends:
            known = ", ".join(self._backends)
            raise InvalidValueError(f"engine {request.candidate.config.engine!r} is unknown; choose {known}")
        self._known.add(request.trial)
        self._turn()
        self._running[request.trial] = _Trial(request=request, began_s=time.monotonic())
        self._queue.append(request.trial)
        self._route_queue()
        return TrialHandle(trial=request.trial, config_key=request.candidate.config.key)

    def poll(self, handle: TrialHandle) -> Running | Outcome:
        """State of the trial; raises `InvalidValueError` for one that was never started here.

        The outcome is kept for some hundred trials after it was first told.
        """
        self._turn()
        if handle.trial in self._outcomes:
            return self._tell(handle.trial)
        trial = self._running.get(handle.trial)
        if trial is None:
            raise InvalidValueError(f"trial {handle.trial!r} is unknown to this runner (any more); start it first")
        return Running(phase=trial.phase, elapsed_s=time.monotonic() - trial.began_s)

    def stop(self, handle: TrialHandle) -> None:
        """End the trial and its deployment, and wait until its devices are free; a no-op when it has ended."""
        trial = self._running.get(handle.trial)
        why = f"trial {handle.trial} was stopped before it was measured"
        if trial is not None and trial.owner is not None:
            trial.owner.stop(why)
            self._wait_until_stopped([trial.owner])
        elif trial is not None:
            self._unqueue(handle.trial, why)

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
        why = "the runner was closed before the trial was measured"
        for trial in tuple(self._queue):
            self._unqueue(trial, why)
        self._stop_all(self._deployments, why)
        self._watch.close()
        end_orphans(self._site.study)
        with suppress(OSError):  # it is not empty where another runner of this process uses it
            node_folder(self._site.coordinator).rmdir()

    def _sweep(self) -> tuple[TaggedProcess, ...]:
        """End what dead coordinators of the study left: on this host at once, on the others through Ray."""
        study = self._site.study
        remove_left_folders()
        ended = end_orphans(study)
        nodes = self._cluster.nodes()
        if len(nodes) > 1:
            ended += _all(self._cluster.run_on_every_node(SWEEP_LIMIT_S, end_orphans, study))
        if len(nodes) > 1 and not self._cluster.local:
            ended += self._end_what_others_left({node.host for node in nodes})
        return tuple(ended)

    def _end_what_others_left(self, hosts: Collection[str]) -> list[TaggedProcess]:
        """End processes of the study anywhere whose coordinators, anywhere, are dead: of none of `hosts`, or gone."""
        study, everywhere = self._site.study, self._cluster.run_on_every_node
        others = set(_all(everywhere(SWEEP_LIMIT_S, coordinators_of, study)))
        dead = {process for process in others if process.host not in hosts}
        if others:
            dead |= set(_all(everywhere(SWEEP_LIMIT_S, dead_among, others)))
        return _all(everywhere(SWEEP_LIMIT_S, end_processes_of, study, dead)) if dead else []

    def processes(self) -> dict[str, dict[str, int]]:
        """Process ids by deployment and replica, of the deployments that are up."""
        return {deployment.name: deployment.pids for deployment in self._deployments}

    def _tell(self, trial: str) -> Outcome:
        """The outcome of an ended trial; those told longest ago are forgotten, as studies run for days."""
        outcome = self._outcomes[trial]
        if trial not in self._told:
            self._told.append(trial)
        while len(self._told) > KEPT_OUTCOMES:
            del self._outcomes[self._told.popleft()]
        return outcome

    def _idle(self) -> list[RayDeployment]:
        """Idle deployments, the one used longest ago first."""
        return sorted((d for d in self._deployments if d.state.warm), key=lambda d: d.state.since_s)

    def _route_queue(self) -> None:
        """Start what has room now, in the order of arrival as far as `MOST_OVERTAKEN` asks for it."""
        queued = [self._running[name] for name in self._queue]
        for trial in routed(queued, self._route):
            self._queue.remove(trial.request.trial)

    def _route(self, trial: _Trial) -> bool:
        """Give the trial to a deployment of its configuration or start one; False where its devices are busy."""
        request = trial.request
        config = request.candidate.config
        trial.owner = next((d for d in self._deployments if d.state.alive and d.config == config), None)
        if trial.owner is not None:
            trial.owner.ask(request)
            return True
        live = self._watch.capacity(request.problem.node_pools)
        try:
            if not trial.possible:
                _plan(request, self._backends[config.engine], None)  # however many nodes are there now
                trial.possible = True
            if self._waits_for_nodes(trial, live):
                return False
            busy = [d.config for d in self._deployments if d.state.alive and not d.state.warm]
            if busy and not fit_together([*busy, config], request.problem, live):
                return False
            placement = _plan(request, self._backends[config.engine], live)
        except PlacementError as error:
            never = isinstance(error, CannotSpanError) and not trial.possible
            reason = FailureReason.INVALID_FLAGS if never else FailureReason.PLACEMENT
            self._end(request.trial, Failure(reason=reason, detail=str(error)))
            return True
        trial.owner = self._launch(request, placement, live)
        return True

    def _waits_for_nodes(self, trial: _Trial, live: Mapping[str, int]) -> bool:
        """True where nodes that the trial needs have gone; raises `PlacementError` where they stay away too long."""
        request, now_s = trial.request, time.monotonic()
        if fit_together([request.candidate.config], request.problem, live):
            trial.short_since_s = None
            return False
        trial.short_since_s = trial.short_since_s or now_s
        limit_s = request.limits.placement_s
        if now_s - trial.short_since_s > limit_s:
            missing = missing_nodes(request.candidate.config, request.problem, live)
            raise PlacementError(
                f"nodes that the deployment needs have gone and did not come back within placement_s={limit_s:g} s: "
                f"{missing} nodes; start them again, or raise the limit"
            )
        return True

    def _unqueue(self, trial: str, why: str) -> None:
        self._queue.remove(trial)
        self._end(trial, Failure(reason=FailureReason.LOST_COORDINATOR, detail=why))

    def _end(self, trial: str, outcome: Outcome) -> None:
        self._outcomes[trial] = outcome
        del self._running[trial]

    def _launch(self, request: TrialRequest, placement: Placement, live: Mapping[str, int]) -> RayDeployment:
        config = request.candidate.config
        backend = self._backends[config.engine]
        if isinstance(backend, PerDeployment):
            backend = backend.for_deployment(config, request.problem)
        self._make_room(request, live)
        self._count += 1
        deployment = RayDeployment(
            name=f"{config.key}-{self._count}",
            request=request,
            placement=placement,
            backend=backend,
            site=self._site,
            avoided=self._avoided(request),
        )
        self._deployments.append(deployment)
        return deployment

    def _avoided(self, request: TrialRequest) -> frozenset[str]:
        """Nodes that are lost, and those that are distrusted where the others have room for the deployment."""
        lost, distrusted = self._watch.lost, self._watch.distrusted
        busy = [d.config for d in self._deployments if d.state.alive and not d.state.warm]
        trusted = self._watch.trusted_capacity(request.problem.node_pools)
        if distrusted and fit_together([*busy, request.candidate.config], request.problem, trusted):
            return lost | distrusted
        return lost

    def _make_room(self, request: TrialRequest, live: Mapping[str, int]) -> None:
        """Stop idle deployments, the one used longest ago first, until the pools and the client's cores have room."""
        standing = [d for d in self._deployments if d.state.alive]
        for idle in self._idle():
            configs = [*(d.config for d in standing), request.candidate.config]
            crowded = self._cluster.local and len(configs) > self._cluster.trials_at_once
            if not crowded and fit_together(configs, request.problem, live):
                return
            idle.stop("another configuration needs its devices")
            standing.remove(idle)

    def _turn(self) -> None:
        """Let every deployment act on what has happened; at most every `TURN_S`, however many trials are polled."""
        if time.monotonic() - self._turned_s < TURN_S:
            return
        self._turned_s = time.monotonic()
        self._watch.turn(frozenset(deployment.lease for deployment in self._deployments))
        requeued: list[str] = []
        for deployment in list(self._deployments):
            deployment.turn()
            requeued += self._collect(deployment)
            if deployment.state.phase is life.Phase.STOPPED:
                self._deployments.remove(deployment)
        for trial in requeued:
            self._running[trial].owner = None
        self._queue = [*requeued, *self._queue]
        self._route_queue()
        self._relieve_pressure()

    def _collect(self, deployment: RayDeployment) -> list[str]:
        """Take over the outcomes of `deployment`; returns the trials that need another one."""
        outcomes, deployment.outcomes = deployment.outcomes, {}
        for trial, outcome in outcomes.items():
            self._end(trial, outcome)
        requeued, deployment.requeued = deployment.requeued, []
        return requeued

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
            self._turned_s = 0.0
            self._turn()
            if all(d.state.phase is life.Phase.STOPPED for d in deployments):
                return
            time.sleep(PAUSE_S)


def _all(answers: Mapping[str, Sequence[Found]]) -> list[Found]:
    """What all nodes answered."""
    return [found for answer in answers.values() for found in answer]


def _plan(request: TrialRequest, backend: EngineBackend, live: Mapping[str, int] | None) -> Placement:
    """Bundles of the deployment; raises `PlacementError` where the pools or the engine could never hold it."""
    config = request.candidate.config
    placement = plan_placement(config, request.problem, live)
    for leader in placement.leaders:
        parts = placement.parts(leader)
        refusal = _span_refusal(backend, config, leader, parts) if len(parts) > 1 else None
        if refusal is not None:
            raise CannotSpanError(
                f"{', '.join(part.name for part in parts)} would be parts of a replica that spans nodes: {refusal}; "
                "use fewer devices per replica"
            )
    return placement


def _span_refusal(backend: EngineBackend, config: ServingConfig, leader: Bundle, parts: Sequence[Bundle]) -> str | None:
    if not isinstance(backend, SpansNodes):
        return f"engine {config.engine} cannot do that"
    pool = next(pool for pool in config.pools if pool.role is leader.role)
    return backend.span_refusal(pool, tuple(part.devices for part in parts))
