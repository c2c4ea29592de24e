"""One deployment on Ray: carries out what its state machine says, and turns what happens into events.

Never waits for long: `turn` looks at what has happened since the last one. All processes of a deployment are owned by
actors in one placement group, and these by the driver: when it dies, they go.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import deployment as life
from cluster.cache_reset import CacheReset
from cluster.cores import CoreLedger
from cluster.engines.base import EngineBackend, NeedsSharedFolder, ReplicaPart, ResetsCaches, RouterSpec
from cluster.load.driver import LoadRun
from cluster.load.measure import TIMINGS_ARTIFACT, LoadMeasurement
from cluster.node_facts import NodeFacts
from cluster.placement import Bundle, BundleKind, Placement
from cluster.power import total_power_w
from cluster.processes import ProcessId, Tags
from cluster.ray_actors import MARKER, Job, ProcessActor, ReplicaJob, RouterJob, Seat, Serving
from cluster.ray_calls import Calls
from cluster.ray_inquiry import Inquiry, lost_actor, silent_node
from cluster.ray_load import LoadActor, LoadJob, LoadReply
from cluster.ray_nodes import NodeWatch
from cluster.ray_session import RayCluster
from cluster.records import engine_facts, environment, keep_logs, price_per_hour
from cluster.runner import TrialRequest
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome
from search_spaces.serving import Role

OVERLAPPING_CALLS = 8
TIMINGS_FILE = "request_timings.parquet"
ROUTER_STATS_FILE = "router_stats.json"
LOOPBACK = "127.0.0.1"
NODE_LABEL = "ray.io/node-id"
"""A label that Ray gives every node: its id."""
_BOOT_TIMINGS = ("placement", "start")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What all deployments of a runner share. `ledgers` are the cores of each machine, by its id.

    Clients must send `api_key` to every engine and router. `watch` knows which nodes are really there.
    """

    study: str
    cluster: RayCluster
    coordinator: ProcessId
    work_dir: Path
    api_key: str = field(repr=False)
    watch: NodeWatch
    ledgers: dict[str, CoreLedger] = field(default_factory=dict)

    def ledger(self, facts: NodeFacts) -> CoreLedger:
        """The core ledger of the machine that `facts` describe."""
        return self.ledgers.setdefault(facts.machine, CoreLedger(facts.cores))


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
        self._group: PlacementGroup | None = None
        self._actors: dict[str, Any] = {}
        self._calls = Calls()
        self._logs: dict[str, bytes] = {}
        self._inquiry = Inquiry(
            calls=self._calls, watch=site.watch, verdict=lambda failure: self._feed(life.Faulted(failure=failure))
        )
        self._facts: dict[str, NodeFacts] = {}
        self._addresses: dict[str, str] = {}
        self._seats: dict[str, Seat] = {}
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
        if self._state.phase is life.Phase.PLACING and _is_placed(self._group):
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
        self._investigate(name, lost_actor(name, self._facts.get(name), self._site.watch, error))

    def _is_silent(self, name: str) -> bool:
        """True where the node of `name` does not answer, whatever Ray says."""
        facts = self._facts.get(name)
        return facts is not None and facts.node_id in self._site.watch.lost

    def _look_at_nodes(self) -> None:
        silent = {name: facts for name, facts in self._facts.items() if self._is_silent(name)}
        if silent and not self._inquiry.is_open:
            self._investigate(next(iter(silent)), silent_node(silent))

    def _investigate(self, name: str, failure: Failure | None) -> None:
        """Stop for what tells most of a fault: `failure` is the first sign of it, which is rarely the cause."""
        if self._state.alive:
            there = {b.name: self._actors[b.name] for b in self._processes if not self._is_silent(b.name)}
            ready = self._state.phase not in life.BOOTING
            self._inquiry.hear(name, failure, actors=there, facts=self._facts, ready=ready)

    @property
    def _processes(self) -> tuple[Bundle, ...]:
        """The bundles that hold a process: all but the load generator."""
        return tuple(bundle for bundle in self._placement.bundles if bundle.kind is not BundleKind.CLIENT)

    # placement and start

    def _reserve(self) -> None:
        bundles = self._placement.bundles
        avoided = {NODE_LABEL: f"!in({','.join(sorted(self._avoided))})"} if self._avoided else {}
        self._group = placement_group(
            [bundle.resources for bundle in bundles],
            strategy="PACK",
            name=f"tuner:{self._site.study}:{self.name}",
            bundle_label_selector=[{**avoided, **bundle.labels} for bundle in bundles],
        )

    def _start_actors(self, limit_s: float) -> None:
        self._start_by_s = time.monotonic() + limit_s
        (self.folder / "shared").mkdir(parents=True, exist_ok=True)
        (self.folder / MARKER).touch()
        for index, bundle in enumerate(self._placement.bundles):
            actor = self._make_actor(bundle, _scheduling(self._group, index))
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
        self._facts[name] = facts
        if len(self._facts) < len(self._placement.bundles) or self._state.phase is not life.Phase.STARTING:
            return
        blind = self._blind()
        if blind is not None:
            self._feed(life.Faulted(failure=Failure(reason=FailureReason.PLACEMENT, detail=blind)))
            return
        self._take_seats()
        for leader in self._placement.leaders:
            parts = self._placement.parts(leader)
            if len(parts) == 1:
                self._serve(leader, self._replica_job(leader))
            else:
                port = self._actors[leader.name].free_port.remote(self._seats[leader.name].host)
                self._calls.add(port, partial(self._serve_parts, parts), partial(self._gone, leader.name))

    def _serve_parts(self, parts: tuple[Bundle, ...], port: int) -> None:
        """Start a replica that spans nodes: all parts at once, they meet at `port` of the first."""
        hosts = tuple(self._seats[bundle.name].host for bundle in parts)
        devices = tuple(bundle.devices for bundle in parts)
        for rank, bundle in enumerate(parts):
            part = ReplicaPart(rank=rank, hosts=hosts, devices=devices, rendezvous_port=port)
            self._serve(bundle, self._replica_job(bundle, part))

    def _blind(self) -> str | None:
        """Why the engine cannot hand over between these nodes, None where it can."""
        backend, facts = self._backend, self._facts
        nodes = {facts[bundle.name].node_id for bundle in self._processes}
        hosts = sorted({facts[b.name].host for b in self._processes if not facts[b.name].sees_folder})
        needed = isinstance(backend, NeedsSharedFolder) and backend.needs_shared_folder(self.config)
        if len(nodes) == 1 or not hosts or not needed:
            return None
        return (
            f"engine {backend.name} hands KV caches over through files, and {', '.join(hosts)} does not see "
            f"{self.folder}; put the work folder on a file system that all nodes share, or use one node"
        )

    def _take_seats(self) -> None:
        """Cores for everyone, the replicas first; one node talks over the loopback address."""
        self._addresses = addresses = {node.node_id: node.ip for node in self._site.cluster.nodes()}
        one_node = len({facts.node_id for facts in self._facts.values()}) == 1
        router = self._placement.router
        for bundle in (*self._placement.replicas, self._placement.client, *((router,) if router else ())):
            facts = self._facts[bundle.name]
            cores = self._grant(bundle, self._site.ledger(facts))
            host = LOOPBACK if one_node else addresses.get(facts.node_id, facts.host)
            devices = facts.gpu_ids if bundle.gpus else cores
            self._seats[bundle.name] = Seat(
                host=host,
                cores=cores,
                device_ids=devices,
                on_gpu=bundle.gpus > 0,
                node=facts.node_id,
                api_key=self._site.api_key,
            )

    def _grant(self, bundle: Bundle, ledger: CoreLedger) -> tuple[int, ...]:
        owner = self._owner(bundle.name)
        match bundle.kind:
            case BundleKind.CLIENT:
                return ledger.grant_client(owner)
            case BundleKind.ROUTER:
                return ledger.grant_router(owner)
            case BundleKind.REPLICA:
                return ledger.grant_host() if bundle.gpus else ledger.grant_replica(owner, bundle.devices)

    def _owner(self, bundle_name: str) -> str:
        return f"{self.name}/{bundle_name}"

    def _replica_job(self, bundle: Bundle, part: ReplicaPart | None = None) -> ReplicaJob:
        problem = self._booted_for.problem
        return ReplicaJob(
            backend=self._backend,
            name=bundle.name,
            trial=self._booted_for.trial,
            pool=next(pool for pool in self.config.pools if pool.role is bundle.role),
            index=bundle.index,
            model=problem.model,
            workload=problem.workload,
            model_dir=self._site.work_dir / "models",
            work_dir=self.folder,
            shared_dir=self.folder / "shared",
            peer=next((pool for pool in self.config.pools if pool.role is not bundle.role), None),
            part=part,
        )

    def _start_router(self) -> None:
        router = self._placement.router
        if router is not None:
            self._serve(router, RouterJob(backend=self._backend, spec=self._router_spec(), work_dir=self.folder))

    def _router_spec(self) -> RouterSpec:
        urls: dict[Role | None, list[str]] = {}
        for bundle in self._placement.leaders:
            urls.setdefault(bundle.role, []).append(self._serving[bundle.name].url)
        pools = {pool.role: pool for pool in self.config.pools}
        return RouterSpec(
            trial=self._booted_for.trial,
            host=LOOPBACK,
            port=0,
            model=self._booted_for.problem.model,
            prefill_urls=tuple(urls.get(Role.PREFILL, ())),
            decode_urls=tuple(urls.get(Role.DECODE, ())),
            mixed_urls=tuple(urls.get(Role.MIXED, ())),
            prefill_pool=pools.get(Role.PREFILL),
            decode_pool=pools.get(Role.DECODE),
            shared_dir=self.folder / "shared",
        )

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
        problem, router = request.problem, self._placement.router
        url = self._serving[(router or self._placement.replicas[0]).name].url
        run = LoadRun(
            url=url,
            model_name=problem.model.name,
            workload=problem.workload,
            load=request.candidate.load,
            vocab_size=problem.model.vocab_size,
            seed=request.seed,
            rule=request.rule,
            limit_s=request.limits.measure_s,
            timings_path=request.artifact_dir / TIMINGS_FILE,
            api_key=self._site.api_key,
        )
        client = self._placement.client.name
        job = LoadJob(
            run=run,
            slos=problem.slos,
            devices=self.config.devices,
            price_per_hour=price_per_hour(self.config, problem),
            cores=self._seats[client].cores,
            router_url=None if router is None else url,
            resets=self._resets(),
            first_rate=request.first_rate,
        )
        reference = self._actors[client].measure.remote(job)
        self._calls.add(reference, partial(self._measured, request.trial), partial(self._gone, client))

    def _resets(self) -> tuple[CacheReset, ...]:
        """What makes every replica forget earlier prompts."""
        backend = self._backend
        if not isinstance(backend, ResetsCaches):
            return ()
        pools = {pool.role: pool for pool in self.config.pools}
        return tuple(
            CacheReset(url=self._serving[bundle.name].url + call.path, method=call.method)
            for bundle in self._placement.leaders
            if bundle.role is not None
            for call in backend.reset_calls(pools[bundle.role])
        )

    def _measured(self, trial: str, reply: LoadReply) -> None:
        artifacts = _keep_files(reply, self._requests[trial].artifact_dir)
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
        shared = [
            name
            for name, facts in self._facts.items()
            if name in self._seats and self._site.ledger(facts).shared(self._owner(name))
        ]
        launched = [serving.launched for serving in self._serving.values()]
        return environment(
            backend=self._backend,
            ray_version=ray.__version__,
            nodes=self._facts,
            addresses=self._addresses,
            cores={name: seat.cores for name, seat in self._seats.items()},
            shared=shared,
            oversubscribed=self._site.cluster.oversubscribed,
        ) | engine_facts(self._backend, self.config, launched)

    def _stop_processes(self, limit_s: float) -> None:
        """End the processes; their logs come with the answers, and those of lost actors are lost."""
        self._calls.clear()
        there = [b.name for b in self._processes if not self._is_silent(b.name)]
        stops = {name: self._actors[name].stop.remote(limit_s) for name in there}
        self._calls.gather(stops, self._stopped, limit_s + life.START_GRACE_S)

    def _stopped(self, logs: Mapping[str, bytes]) -> None:
        self._logs.update(logs)
        self._feed(life.ProcessesEnded())

    def _free(self) -> None:
        """Give back the placement group, which ends its actors, and the cores."""
        self._calls.clear()
        if self._group is not None:
            remove_placement_group(self._group)
        for name in self._seats:
            self._site.ledger(self._facts[name]).free(self._owner(name))
        self._actors.clear()


def _is_placed(group: PlacementGroup | None) -> bool:
    table: dict[str, Any] = placement_group_table(group)
    return bool(table["state"] == "CREATED")


def _scheduling(group: PlacementGroup | None, index: int) -> PlacementGroupSchedulingStrategy:
    if group is None:
        raise AssertionError("actors are started in a placement group that was reserved before")
    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)


def _keep_files(reply: LoadReply, folder: Path) -> dict[str, str]:
    """Write what the load generator sent into `folder`; paths by artefact name."""
    stats = (reply.router_stats or "").encode()
    kept = {}
    for name, file, content in (
        (TIMINGS_ARTIFACT, TIMINGS_FILE, reply.timings),
        ("router_stats", ROUTER_STATS_FILE, stats),
    ):
        if content:
            (folder / file).write_bytes(content)
            kept[name] = str(folder / file)
    return kept
