"""What the processes of a deployment are told: the jobs of its replicas, its router and its load generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.cache_reset import CacheReset
from cluster.engines.base import EngineBackend, NeedsSharedFolder, ReplicaPart, ResetsCaches, RouterSpec
from cluster.load.driver import LoadRun
from cluster.load.measure import TIMINGS_ARTIFACT
from cluster.placement import Bundle, Placement
from cluster.ray_actors import ReplicaJob, RouterJob, Serving
from cluster.ray_load import LoadJob, LoadReply
from cluster.ray_seats import LOOPBACK, Seats
from cluster.records import price_per_hour
from cluster.runner import TrialRequest
from search_spaces.serving import Role, ServingConfig

TIMINGS_FILE = "request_timings.parquet"
ROUTER_STATS_FILE = "router_stats.json"


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """Jobs of the deployment that `backend` starts for `request` in `placement`, with `folder` for its files."""

    request: TrialRequest
    placement: Placement
    backend: EngineBackend
    seats: Seats
    folder: Path

    @property
    def config(self) -> ServingConfig:
        """The configuration of the deployment."""
        return self.request.candidate.config

    def blind(self, processes: tuple[Bundle, ...]) -> str | None:
        """Why the engine cannot hand over between the nodes of `processes`, None where it can."""
        backend, facts = self.backend, self.seats.facts
        nodes = {facts[bundle.name].node_id for bundle in processes}
        hosts = sorted({facts[b.name].host for b in processes if not facts[b.name].sees_folder})
        needed = isinstance(backend, NeedsSharedFolder) and backend.needs_shared_folder(self.config)
        if len(nodes) == 1 or not hosts or not needed:
            return None
        return (
            f"engine {backend.name} hands KV caches over through files, and {', '.join(hosts)} does not see "
            f"{self.folder}; put the work folder on a file system that all nodes share, or use one node"
        )

    def replica(self, bundle: Bundle, part: ReplicaPart | None = None) -> ReplicaJob:
        """The job of a replica, or of its `part` on one of several nodes."""
        problem = self.request.problem
        return ReplicaJob(
            backend=self.backend,
            name=bundle.name,
            trial=self.request.trial,
            pool=next(pool for pool in self.config.pools if pool.role is bundle.role),
            index=bundle.index,
            model=problem.model,
            workload=problem.workload,
            model_dir=self.seats.site.work_dir / "models",
            work_dir=self.folder,
            shared_dir=self.folder / "shared",
            peer=next((pool for pool in self.config.pools if pool.role is not bundle.role), None),
            part=part,
        )

    def router(self, serving: Mapping[str, Serving]) -> RouterJob:
        """The job of the router, once all replicas are `serving`."""
        urls: dict[Role | None, list[str]] = {}
        for bundle in self.placement.leaders:
            urls.setdefault(bundle.role, []).append(serving[bundle.name].url)
        pools = {pool.role: pool for pool in self.config.pools}
        spec = RouterSpec(
            trial=self.request.trial,
            host=LOOPBACK,
            port=0,
            model=self.request.problem.model,
            prefill_urls=tuple(urls.get(Role.PREFILL, ())),
            decode_urls=tuple(urls.get(Role.DECODE, ())),
            mixed_urls=tuple(urls.get(Role.MIXED, ())),
            prefill_pool=pools.get(Role.PREFILL),
            decode_pool=pools.get(Role.DECODE),
            shared_dir=self.folder / "shared",
        )
        return RouterJob(backend=self.backend, spec=spec, work_dir=self.folder)

    def load(self, request: TrialRequest, serving: Mapping[str, Serving]) -> LoadJob:
        """The job of the load generator for `request`, which may be another than the deployment was started for."""
        problem, router = request.problem, self.placement.router
        url = serving[(router or self.placement.replicas[0]).name].url
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
            api_key=self.seats.site.api_key,
        )
        return LoadJob(
            run=run,
            slos=problem.slos,
            devices=self.config.devices,
            price_per_hour=price_per_hour(self.config, problem),
            cores=self.seats[self.placement.client.name].cores,
            router_url=None if router is None else url,
            resets=self._resets(serving),
            first_rate=request.first_rate,
        )

    def _resets(self, serving: Mapping[str, Serving]) -> tuple[CacheReset, ...]:
        """What makes every replica forget earlier prompts."""
        backend = self.backend
        if not isinstance(backend, ResetsCaches):
            return ()
        pools = {pool.role: pool for pool in self.config.pools}
        return tuple(
            CacheReset(url=serving[bundle.name].url + call.path, method=call.method)
            for bundle in self.placement.leaders
            if bundle.role is not None
            for call in backend.reset_calls(pools[bundle.role])
        )


def keep_files(reply: LoadReply, folder: Path) -> dict[str, str]:
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
