"""One deployment on Ray: carries out what its state machine says, and turns what happens into events.

Never waits for long: `turn` looks at what has happened since the last one. All processes of a deployment are owned by
actors in one placement group, and these by the driver: when it dies, they go.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import deployment as life
from cluster.engines.base import EngineBackend, ReplicaPart
from cluster.load.measure import LoadMeasurement
from cluster.node_facts import NodeFacts
from cluster.placement import Bundle, BundleKind, Placement
from cluster.power import total_power_w
from cluster.processes import Tags
from cluster.ray_actors import MARKER, Job, ProcessActor, Serving
from cluster.ray_calls import Calls
from cluster.ray_group import Group
from cluster.ray_inquiry import Inquiry, lost_actor, silent_node
from cluster.ray_jobs import Jobs, keep_files
from cluster.ray_load import LoadActor, LoadReply
from cluster.ray_seats import Seats
from cluster.ray_site import Site
from cluster.records import engine_facts, environment, keep_logs
from cluster.runner import TrialRequest
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome

OVERLAPPING_CALLS = 8
NODE_LABEL = "ray.io/node-id"
"""A label that Ray gives every node: its id."""
_BOOT_TIMINGS = ("placement", "start")


class RayDeployment:
    """A deployment that is started for `request`; nothing of it goes to the `avoided` nodes (their ids)."""

    def __init__(
        self,
        *,
        name: str,
        request: TrialRequest,
        placement: Placement,
        backend: EngineBackend,
        site: Site,
        avoided: frozenset[str] = frozenset(),
    ) -> None:
        self.name = name
        self.config = request.candidate.config
        self.outcomes: dict[str, Outcome] = {}
        self.requeued: list[str] = []
        self._placement, self._backend, self._site, self._avoided = placement, backend, site, avoided
        self._booted_for = request
        self._requests = {request.trial: request}
        self._group: Group | None = None
        self._actors: dict[str, Any] = {}
        self._calls = Calls()
        self._logs: dict[str, bytes] = {}
        self._inquiry = Inquiry(
            calls=self._calls, watch=site.watch, verdict=lambda failure: self._feed(life.Faulted(failure=failure))
        )
        self._seats = Seats(owner=name, placement=placement, site=site)
        self._jobs = Jobs(request=request, placement=placement, backend=backend, seats=self._seats, folder=self.folder)
        self._serving: dict[str, Serving] = {}
        self._start_by_s = 0.0
        routed = placement.router is not None
        self._state, instructions = life.begin(
            request.trial, limits=request.limits, routed=routed, now_s=time.monotonic()
        )
        self._carry_out(instructions)

    @property
    def state(self) -> life.Deployment:
        """Where its life stands."""
        return self._state

    @property
    def lease(self) -> str:
        """The trial whose name the processes carry."""
        return self._booted_for.trial

    @property
    def folder(self) -> Path:
        """Work folder of the deployment; it goes with it."""
        return self._site.work_dir / self.name

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of replicas and router, by bundle name."""
        return {name: serving.pid for name, serving in self._serving.items()}

    def ask(self, request: TrialRequest) -> None:
        """Measure `request` as soon as the deployment is ready for it."""
        self._requests[request.trial] = request
        self._feed(life.Asked(trial=request.trial))

    def stop(self, why: str) -> None:
        """Begin to stop."""
        self._feed(life.StopAsked(why=why))

    def turn(self) -> None:
        """Look at what has happened and act on it."""
        if self._state.phase is life.Phase.PLACING and self._group is not None and self._group.is_placed():
            self._feed(life.Placed())
        self._calls.turn()
        self._look_at_nodes()
        self._feed(life.Tick())

    def _feed(self, event: life.Event) -> None:
        self._state, instructions = life.advance(self._state, event, time.monotonic())
        self._carry_out(instructions)
        if self._state.phase is life.Phase.STOPPED:
            shutil.rmtree(self.folder, ignore_errors=True)  # an engine that is being killed may still write

    def _carry_out(self, instructions: tuple[life.Instruction, ...]) -> None:
        for instruction in instructions:
            match instruction:
                case life.Reserve():
                    self._reserve()
                case life.StartReplicas(limit_s=limit_s):
                    self._start_actors(limit_s)
                case life.StartRouter():
                    self._start_router()
                case life.Measure(trial=trial):
                    self._measure(self._requests[trial])
                case life.Report(trial=trial, outcome=outcome):
                    self._report(self._requests[trial], outcome)
                case life.Requeue(trial=trial):
                    self.requeued.append(trial)
                case life.StopProcesses(limit_s=limit_s):
                    self._stop_processes(limit_s)
                case life.Free():
                    self._free()

    # faults

    def _gone(self, name: str, error: ray.exceptions.RayError) -> None:
        self._investigate(name, lost_actor(name, self._seats.facts.get(name), self._site.watch, error))

    def _look_at_nodes(self) -> None:
        silent = {name: facts for name, facts in self._seats.facts.items() if self._seats.is_silent(name)}
        if silent and not self._inquiry.is_open:
            self._investigate(next(iter(silent)), silent_node(silent))

    def _investigate(self, name: str, failure: Failure | None) -> None:
        """Stop for what tells most of a fault: `failure` is the first sign of it, which is rarely the cause."""
        if self._state.alive:
            there = {b.name: self._actors[b.name] for b in self._processes if not self._seats.is_silent(b.name)}
            ready = self._state.phase not in life.BOOTING
            self._inquiry.hear(name, failure, actors=there, facts=self._seats.facts, ready=ready)

    @property
    def _processes(self) -> tuple[Bundle, ...]:
        """The bundles that hold a process: all but the load generator."""
        return tuple(bundle for bundle in self._placement.bundles if bundle.kind is not BundleKind.CLIENT)

    # placement and start

    def _reserve(self) -> None:
        bundles = self._placement.bundles
        avoided = {NODE_LABEL: f"!in({','.join(sorted(self._avoided))})"} if self._avoided else {}
        self._group = Group(
            [bundle.resources for bundle in bundles],
            name=f"tuner:{self._site.study}:{self.name}",
            selectors=[{**avoided, **bundle.labels} for bundle in bundles],
        )

    def _start_actors(self, limit_s: float) -> None:
        self._start_by_s = time.monotonic() + limit_s
        (self.folder / "shared").mkdir(parents=True, exist_ok=True)
        (self.folder / MARKER).touch()
        if self._group is None:
            raise AssertionError("actors are started in a placement group that was reserved before")
        for index, bundle in enumerate(self._placement.bundles):
            actor = self._make_actor(bundle, self._group.scheduling(index))
            self._actors[bundle.name] = actor
            then, lost = partial(self._learned, bundle.name), partial(self._gone, bundle.name)
            self._calls.add(actor.facts.remote(self.folder), then, lost)

    def _make_actor(self, bundle: Bundle, scheduling: PlacementGroupSchedulingStrategy) -> Any:
        options: dict[str, Any] = {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "max_restarts": 0,
            "scheduling_strategy": scheduling,
        }
        if bundle.kind is BundleKind.CLIENT:
            return ray.remote(LoadActor).options(**options).remote(self._site.coordinator)
        tags = Tags(study=self._site.study, trial=self._booted_for.trial, coordinator=self._site.coordinator)
        return ray.remote(ProcessActor).options(max_concurrency=OVERLAPPING_CALLS, **options).remote(tags)

    def _learned(self, name: str, facts: NodeFacts) -> None:
        self._seats.facts[name] = facts
        if len(self._seats.facts) < len(self._placement.bundles) or self._state.phase is not life.Phase.STARTING:
            return
        blind = self._jobs.blind(self._processes)
        if blind is not None:
            self._feed(life.Faulted(failure=Failure(reason=FailureReason.PLACEMENT, detail=blind)))
            return
        self._seats.take()
        for leader in self._placement.leaders:
            parts = self._placement.parts(leader)
            if len(parts) == 1:
                self._serve(leader, self._jobs.replica(leader))
            else:
                port = self._actors[leader.name].free_port.remote(self._seats[leader.name].host)
                self._calls.add(port, partial(self._serve_parts, parts), partial(self._gone, leader.name))

    def _serve_parts(self, parts: tuple[Bundle, ...], port: int) -> None:
        """Start a replica that spans nodes: all parts at once, they meet at `port` of the first."""
        hosts = tuple(self._seats[bundle.name].host for bundle in parts)
        devices = tuple(bundle.devices for bundle in parts)
        for rank, bundle in enumerate(parts):
            part = ReplicaPart(rank=rank, hosts=hosts, devices=devices, rendezvous_port=port)
            self._serve(bundle, self._jobs.replica(bundle, part))

    def _start_router(self) -> None:
        router = self._placement.router
        if router is not None:
            self._serve(router, self._jobs.router(self._serving))

    def _serve(self, bundle: Bundle, job: Job) -> None:
        left_s = max(0.0, self._start_by_s - time.monotonic())
        reference = self._actors[bundle.name].serve.remote(job, self._seats[bundle.name], left_s)
        self._calls.add(reference, partial(self._served, bundle.name), partial(self._gone, bundle.name))

    def _served(self, name: str, answer: Serving | Failure) -> None:
        if isinstance(answer, Failure):
            self._investigate(name, answer)
            return
        self._serving[name] = answer
        self._calls.add(self._actors[name].watch.remote(), partial(self._ended, name), partial(self._gone, name))
        router = self._placement.router
        if router is not None and name == router.name:
            self._feed(life.RouterReady())
        elif all(bundle.name in self._serving for bundle in self._placement.replicas):
            self._feed(life.ReplicasReady())

    def _ended(self, name: str, by_itself: bool) -> None:
        if by_itself:
            self._investigate(name, None)  # its own account will say why

    # measuring

    def _measure(self, request: TrialRequest) -> None:
        request.artifact_dir.mkdir(parents=True, exist_ok=True)
        client = self._placement.client.name
        reference = self._actors[client].measure.remote(self._jobs.load(request, self._serving))
        self._calls.add(reference, partial(self._measured, request.trial), partial(self._gone, client))

    def _measured(self, trial: str, reply: LoadReply) -> None:
        artifacts = keep_files(reply, self._requests[trial].artifact_dir)
        outcome = reply.outcome
        if isinstance(outcome, LoadMeasurement):
            measurement = self._measurement(outcome, artifacts)
            if reply.kv_tokens is not None:
                measurement = replace(measurement, environment={"kv_tokens_handed_over": f"{reply.kv_tokens:.0f}"})
            self._with_power(trial, measurement, outcome.measure_s)
            return
        failure = replace(outcome, artifacts={**outcome.artifacts, **artifacts})
        if failure.reason is FailureReason.LATE_CLIENT:  # the deployment is not to blame and stays up
            self._with_logs(trial, failure)
        else:
            self._investigate(self._placement.client.name, failure)

    def _with_power(self, trial: str, measurement: Measurement, measure_s: float) -> None:
        """Add the power of the replicas' GPUs over the time of the measurement, then the logs."""
        names = [bundle.name for bundle in self._placement.replicas]
        if measurement.emulated or not all(self._seats[name].on_gpu for name in names):
            self._with_logs(trial, measurement)
            return
        calls = {name: self._actors[name].power_w.remote(measure_s) for name in names}
        self._calls.gather(calls, partial(self._powered, trial, measurement))

    def _powered(self, trial: str, measurement: Measurement, watts: Mapping[str, float | None]) -> None:
        known = total_power_w([watts.get(bundle.name) for bundle in self._placement.replicas])
        self._with_logs(trial, replace(measurement, metrics=replace(measurement.metrics, power_w=known)))

    def _with_logs(self, trial: str, outcome: Outcome) -> None:
        """Tell what became of `trial` when the logs have come; the processes go on."""
        calls = {bundle.name: self._actors[bundle.name].log.remote() for bundle in self._processes}
        self._calls.gather(calls, partial(self._tell, trial, outcome))

    def _tell(self, trial: str, outcome: Outcome, logs: Mapping[str, bytes]) -> None:
        self._logs.update(logs)
        self._feed(life.Measured(trial=trial, outcome=outcome))

    def _measurement(self, outcome: LoadMeasurement, artifacts: Mapping[str, str]) -> Measurement:
        return Measurement(
            metrics=outcome.metrics,
            client_lateness_ms=outcome.lateness_ms,
            timings_s={"warm_up": outcome.warm_up_s, "measure": outcome.measure_s},
            artifacts=artifacts,
            emulated=self._backend.emulated,
            probes=outcome.probes,
            processes=tuple(self._serving[b.name].launched for b in self._placement.bundles if b.name in self._serving),
        )

    # telling and ending

    def _report(self, request: TrialRequest, outcome: Outcome) -> None:
        """Keep `outcome` with the logs, phase timings and environment added."""
        spent = self._state.spent_s
        booted = request.trial == self._booted_for.trial
        labels = _BOOT_TIMINGS if booted else ()
        timings = {label: spent[label] for label in (*labels, "stop") if label in spent}
        self.outcomes[request.trial] = replace(
            outcome,
            artifacts={**keep_logs(self._logs, request.artifact_dir), **outcome.artifacts},
            timings_s={**timings, **outcome.timings_s},
            environment={**self._environment(), **outcome.environment},
        )

    def _environment(self) -> dict[str, str]:
        launched = [serving.launched for serving in self._serving.values()]
        return environment(
            backend=self._backend,
            ray_version=ray.__version__,
            nodes=self._seats.facts,
            addresses=self._seats.addresses,
            cores=self._seats.cores,
            shared=self._seats.sharing,
            oversubscribed=self._site.cluster.oversubscribed,
        ) | engine_facts(self._backend, self.config, launched)

    def _stop_processes(self, limit_s: float) -> None:
        """End the processes; their logs come with the answers, and those of lost actors are lost."""
        self._calls.clear()
        there = [b.name for b in self._processes if not self._seats.is_silent(b.name)]
        stops = {name: self._actors[name].stop.remote(limit_s) for name in there}
        self._calls.gather(stops, self._stopped, limit_s + life.START_GRACE_S)

    def _stopped(self, logs: Mapping[str, bytes]) -> None:
        self._logs.update(logs)
        self._feed(life.ProcessesEnded())

    def _free(self) -> None:
        """Give back the placement group, which ends its actors, and the cores."""
        self._calls.clear()
        if self._group is not None:
            self._group.remove()
        self._seats.free()
        self._actors.clear()
