"""One deployment on Ray: carries out what its state machine says, and turns what happens into events.

Never waits for long: `turn` looks at what has happened since the last one. All processes of a deployment are owned by
actors in one placement group, and these by the driver: when it dies, they go.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import deployment as life
from cluster.cores import CoreLedger
from cluster.engines.base import EngineBackend, RouterSpec
from cluster.load.driver import LoadRun
from cluster.load.measure import LoadMeasurement
from cluster.node_facts import NodeFacts
from cluster.placement import Bundle, BundleKind, Placement
from cluster.processes import ProcessId, Tags
from cluster.ray_actors import Job, ProcessActor, ReplicaJob, RouterJob, Seat, Serving
from cluster.ray_load import LoadActor, LoadReply
from cluster.ray_session import RayCluster
from cluster.records import environment, keep_logs, price_per_hour
from cluster.runner import TrialRequest
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome
from search_spaces.serving import Role

AUTOPSY_GRACE_S = 0.3
ANSWER_LIMIT_S = 3.0
OVERLAPPING_CALLS = 8
TIMINGS_FILE = "request_timings.parquet"
ROUTER_STATS_FILE = "router_stats.json"
LOOPBACK = "127.0.0.1"
_BOOT_TIMINGS = ("placement", "start")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What all deployments of a runner share. `ledgers` are the cores of each machine, by its id."""

    study: str
    cluster: RayCluster
    coordinator: ProcessId
    work_dir: Path
    ledgers: dict[str, CoreLedger] = field(default_factory=dict)

    def ledger(self, facts: NodeFacts) -> CoreLedger:
        """The core ledger of the machine that `facts` describe."""
        return self.ledgers.setdefault(facts.machine, CoreLedger(facts.cores))


class RayDeployment:
    """A deployment that is started for `request`."""

    def __init__(
        self, *, name: str, request: TrialRequest, placement: Placement, backend: EngineBackend, site: Site
    ) -> None:
        self.name = name
        self.config = request.candidate.config
        self.outcomes: dict[str, Outcome] = {}
        self.requeued: list[str] = []
        self._placement, self._backend, self._site = placement, backend, site
        self._booted_for = request
        self._requests = {request.trial: request}
        self._group: PlacementGroup | None = None
        self._actors: dict[str, Any] = {}
        self._pending: dict[Any, tuple[Callable[[str, Any], None], str]] = {}
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
        if self._pending:
            done, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0, fetch_local=False)
            for reference in done:
                self._take_answer(reference)
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

    # calls to actors

    def _call(self, reference: Any, then: Callable[[str, Any], None], name: str) -> None:
        """Call `then(name, value)` in the turn after `reference` has its value."""
        self._pending[reference] = (then, name)

    def _take_answer(self, reference: Any) -> None:
        if reference not in self._pending:  # an earlier answer of this turn ended the deployment
            return
        then, name = self._pending.pop(reference)
        try:
            value = ray.get(reference, timeout=ANSWER_LIMIT_S)
        except ray.exceptions.RayError as error:
            if then == self._stopped:
                self._stopped(name, None)
            else:
                self._feed(life.Faulted(failure=self._lost(name, error)))
            return
        then(name, value)

    def _lost(self, name: str, error: ray.exceptions.RayError) -> Failure:
        """An actor is gone (with its node, or alone), or met an error that it should have turned into a failure."""
        alive = {node.node_id for node in self._site.cluster.nodes()}
        facts = self._facts.get(name)
        gone = facts is not None and facts.node_id not in alive
        where = f" on {facts.host}" if facts is not None else ""
        text = str(error).strip().splitlines()
        return Failure(
            reason=FailureReason.LOST_NODE if gone else FailureReason.UNHEALTHY_NODE,
            detail=f"the actor of {name}{where} failed: {type(error).__name__}: {text[-1] if text else ''}",
            log_tail="\n".join(text[-20:]),
        )

    # placement and start

    def _reserve(self) -> None:
        bundles = self._placement.bundles
        self._group = placement_group(
            [bundle.resources for bundle in bundles],
            strategy="PACK",
            name=f"tuner:{self._site.study}:{self.name}",
            bundle_label_selector=[dict(bundle.labels) for bundle in bundles],
        )

    def _start_actors(self, limit_s: float) -> None:
        self._start_by_s = time.monotonic() + limit_s
        for index, bundle in enumerate(self._placement.bundles):
            actor = self._make_actor(bundle, _scheduling(self._group, index))
            self._actors[bundle.name] = actor
            self._call(actor.facts.remote(), self._learned, bundle.name)

    def _make_actor(self, bundle: Bundle, scheduling: PlacementGroupSchedulingStrategy) -> Any:
        options: dict[str, Any] = {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "max_restarts": 0,
            "scheduling_strategy": scheduling,
        }
        if bundle.kind is BundleKind.CLIENT:
            return ray.remote(LoadActor).options(**options).remote()
        tags = Tags(study=self._site.study, trial=self._booted_for.trial, coordinator=self._site.coordinator)
        return ray.remote(ProcessActor).options(max_concurrency=OVERLAPPING_CALLS, **options).remote(tags)

    def _learned(self, name: str, facts: NodeFacts) -> None:
        self._facts[name] = facts
        if len(self._facts) < len(self._placement.bundles) or self._state.phase is not life.Phase.STARTING:
            return
        self._take_seats()
        for bundle in self._placement.replicas:
            self._serve(bundle, self._replica_job(bundle))

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
            self._seats[bundle.name] = Seat(host=host, cores=cores, device_ids=devices)

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

    def _replica_job(self, bundle: Bundle) -> ReplicaJob:
        problem = self._booted_for.problem
        shared_dir = self.folder / "shared"
        shared_dir.mkdir(parents=True, exist_ok=True)
        return ReplicaJob(
            backend=self._backend,
            trial=self._booted_for.trial,
            pool=next(pool for pool in self.config.pools if pool.role is bundle.role),
            index=bundle.index,
            model=problem.model,
            workload=problem.workload,
            model_dir=self._site.work_dir / "models",
            work_dir=self.folder,
            shared_dir=shared_dir,
            peer=next((pool for pool in self.config.pools if pool.role is not bundle.role), None),
        )

    def _start_router(self) -> None:
        router = self._placement.router
        if router is not None:
            self._serve(router, RouterJob(backend=self._backend, spec=self._router_spec(), work_dir=self.folder))

    def _router_spec(self) -> RouterSpec:
        urls: dict[Role | None, list[str]] = {}
        for bundle in self._placement.replicas:
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
        self._call(reference, self._served, bundle.name)

    def _served(self, name: str, answer: Serving | Failure) -> None:
        if isinstance(answer, Failure):
            self._feed(life.Faulted(failure=answer))
            return
        self._serving[name] = answer
        self._call(self._actors[name].watch.remote(self._backend), self._ended, name)
        router = self._placement.router
        if router is not None and name == router.name:
            self._feed(life.RouterReady())
        elif all(bundle.name in self._serving for bundle in self._placement.replicas):
            self._feed(life.ReplicasReady())

    def _ended(self, _name: str, failure: Failure | None) -> None:
        if failure is not None:
            self._feed(life.Faulted(failure=failure))

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
        )
        client = self._placement.client.name
        reference = self._actors[client].measure.remote(
            run,
            slos=problem.slos,
            devices=self.config.devices,
            price_per_hour=price_per_hour(self.config, problem),
            cores=self._seats[client].cores,
            router_url=None if router is None else url,
        )
        self._call(reference, self._measured, request.trial)

    def _measured(self, trial: str, reply: LoadReply) -> None:
        request = self._requests[trial]
        artifacts = _keep_stats(reply, request.artifact_dir)
        outcome = reply.outcome
        if isinstance(outcome, LoadMeasurement):
            measurement = self._measurement(outcome, artifacts)
            self._feed(life.Measured(trial=trial, outcome=measurement))
        elif outcome.reason is FailureReason.LATE_CLIENT:  # the deployment is not to blame and stays up
            failure = replace(outcome, artifacts={**outcome.artifacts, **artifacts})
            self._feed(life.Measured(trial=trial, outcome=failure))
        else:
            failure = self._explain(replace(outcome, artifacts={**outcome.artifacts, **artifacts}))
            self._feed(life.Faulted(failure=failure))

    def _measurement(self, outcome: LoadMeasurement, artifacts: dict[str, str]) -> Measurement:
        return Measurement(
            metrics=outcome.metrics,
            client_lateness_ms=outcome.lateness_ms,
            timings_s={"warm_up": outcome.warm_up_s, "measure": outcome.measure_s},
            artifacts={"request_timings": str(outcome.timings_path), **artifacts},
            emulated=self._backend.emulated,
            processes=tuple(self._serving[b.name].launched for b in self._placement.bundles if b.name in self._serving),
        )

    def _explain(self, failure: Failure) -> Failure:
        """The engine's own account where a process died under the load that failed, else `failure` with its logs."""
        names = list(self._serving)
        calls = [self._actors[name].autopsy.remote(self._backend, AUTOPSY_GRACE_S) for name in names]
        tails = [self._actors[name].tail.remote() for name in names]
        try:
            found = [death for death in ray.get(calls, timeout=ANSWER_LIMIT_S) if death is not None]
            texts: list[str] = ray.get(tails, timeout=ANSWER_LIMIT_S)
        except ray.exceptions.RayError as error:
            return replace(failure, log_tail=f"no logs: {type(error).__name__}")
        if found:
            death: Failure = found[0]
            return replace(
                death,
                detail=f"{death.detail}; {failure.detail}",
                artifacts=failure.artifacts,
                timings_s=failure.timings_s,
            )
        return replace(failure, log_tail="\n".join(f"[{n}]\n{t}" for n, t in zip(names, texts, strict=True) if t))

    # telling and ending

    def _report(self, request: TrialRequest, outcome: Outcome) -> None:
        """Keep `outcome` with the logs, phase timings and environment added."""
        logs = [self.folder / f"{bundle.name}.log" for bundle in self._placement.bundles]
        spent = self._state.spent_s
        booted = request.trial == self._booted_for.trial
        labels = _BOOT_TIMINGS if booted else ()
        timings = {label: spent[label] for label in (*labels, "stop") if label in spent}
        self.outcomes[request.trial] = replace(
            outcome,
            artifacts={**keep_logs(logs, request.artifact_dir), **outcome.artifacts},
            timings_s={**timings, **outcome.timings_s},
            environment={**self._environment(), **outcome.environment},
        )

    def _environment(self) -> dict[str, str]:
        shared = [
            name
            for name, facts in self._facts.items()
            if name in self._seats and self._site.ledger(facts).shared(self._owner(name))
        ]
        return environment(
            backend=self._backend,
            ray_version=ray.__version__,
            nodes=self._facts,
            addresses=self._addresses,
            cores={name: seat.cores for name, seat in self._seats.items()},
            shared=shared,
            oversubscribed=self._site.cluster.oversubscribed,
        )

    def _stop_processes(self, limit_s: float) -> None:
        self._pending.clear()
        for bundle in self._placement.bundles:
            if bundle.kind is not BundleKind.CLIENT:
                self._call(self._actors[bundle.name].stop.remote(limit_s), self._stopped, bundle.name)

    def _stopped(self, _name: str, _nothing: None) -> None:
        if not any(then == self._stopped for then, _ in self._pending.values()):
            self._feed(life.ProcessesEnded())

    def _free(self) -> None:
        """Give back the placement group, which ends its actors, and the cores."""
        self._pending.clear()
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


def _keep_stats(reply: LoadReply, folder: Path) -> dict[str, str]:
    if reply.router_stats is None:
        return {}
    path = folder / ROUTER_STATS_FILE
    path.write_text(reply.router_stats, encoding="utf-8")
    return {"router_stats": str(path)}
