"""What the emulated engine is told of a deployment: step times, memory and links from the performance model.

The times are vLLM's by the operation tables where they are installed (the extra `silicon`), and else by the speed of
light of the GPU at the efficiency that the model assumes where no table helps; `EngineProfile.origin` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from perf_model.batch import step_batch
from perf_model.costs import OperationCosts
from perf_model.footprint import Footprint
from perf_model.hosts import HostedSteps, host_traits
from perf_model.layout import PlanContext, ReplicaLayout, plan
from perf_model.precision import checkpoint_precision
from perf_model.silicon import GpuReplica, ReplicaKey, Silicon
from perf_model.steps import TableSteps
from perf_model.systems import GpuSystem
from perf_model.tables import TableStore, default_root
from search_spaces.emulation import EngineProfile, GpuMemory, HandOver, Row, Sheet, StepTimes
from search_spaces.engines.emulated import EMULATED
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import Device, DeviceKind
from search_spaces.model import ModelSpec, MoeFeedForward
from search_spaces.problem import Problem
from search_spaces.serving import OptionValue, Pool, Role, ServingConfig

STANDS_FOR = "vllm"
"""The engine whose operation tables and host overheads are used."""
HAND_OVER_MS = 10.0
"""Exchange of meta-data before a KV cache moves, as in `perf_model.validate`."""
NO_TABLES = Path("no-operation-tables")
_NODE_GPUS = 8
_DOUBLING = tuple(2.0**n for n in range(18))


@dataclass(frozen=True)
class Profiles:
    """Makes profiles; tables and replicas are read once. `root` holds operation tables, None for the speed of light."""

    root: Path | None

    @cached_property
    def _silicon(self) -> Silicon | None:
        return None if self.root is None else Silicon(self.root)

    @cached_property
    def _made(self) -> dict[tuple[ReplicaKey, int, int, int], StepTimes]:
        return {}

    def __call__(self, config: ServingConfig, problem: Problem) -> Mapping[Role, EngineProfile]:
        """Profiles of the replicas of `config` by role; raises `InvalidValueError` where it cannot be served."""
        return {pool.role: self._profile(pool, config, problem) for pool in config.pools}

    def replica(self, pool: Pool, problem: Problem) -> GpuReplica:
        """The performance model's account of a replica; raises `InvalidValueError` for CPUs and unknown GPUs."""
        device = problem.node_pool(pool.node_pool).device
        if device.kind is not DeviceKind.GPU:
            raise InvalidValueError(
                f"the emulated engine stands for GPUs, and node pool {pool.node_pool!r} has {device.name}; "
                "name a GPU as its device"
            )
        key = _key(pool, device, problem.model)
        if self._silicon is not None and (self._silicon.root / f"{device.name}.yaml").is_file():
            return self._silicon.replica(key)
        return _by_speed_of_light(key, device)

    def memory(self, pool: Pool, problem: Problem) -> GpuMemory:
        """Bytes on each GPU of a replica; raises as `replica`."""
        return _memory(self.replica(pool, problem), pool, problem)

    def hand_over(self, pool: Pool, config: ServingConfig, problem: Problem) -> HandOver | None:
        """How the KV caches of `pool` change hands, None where they do not; raises as `replica`."""
        return _hand_over(pool, config, problem, self.replica(pool, problem))

    def _profile(self, pool: Pool, config: ServingConfig, problem: Problem) -> EngineProfile:
        replica = self.replica(pool, problem)
        layout, model = replica.key.layout, problem.model
        by_tables = replica.steps.kernels.costs.store.root != NO_TABLES
        return EngineProfile(
            gpu=replica.key.system,
            gpus=layout.ranks,
            times=self._times(replica, pool, problem),
            memory=self.memory(pool, problem),
            hand_over=self.hand_over(pool, config, problem),
            ranks=layout.dp,
            stages=layout.pp,
            lockstep=layout.dp > 1 and any(isinstance(g.feed_forward, MoeFeedForward) for g in model.layers),
            request_ms=replica.traits.request_ms,
            origin=f"{STANDS_FOR}'s operation tables" if by_tables else "speed of light, no operation tables",
        )

    def _times(self, replica: GpuReplica, pool: Pool, problem: Problem) -> StepTimes:
        sizes = (option(pool, "max_num_batched_tokens"), option(pool, "max_num_seqs"), problem.workload.longest_context)
        budget, seqs, context = (int(size) for size in sizes)
        key = (replica.key, budget, seqs, context)
        if key not in self._made:
            self._made[key] = step_times(replica, budget=budget, seqs=seqs, context=context)
        return self._made[key]


@cache
def installed_profiles() -> Profiles:
    """Profiles from the installed operation tables, or by the speed of light where there are none."""
    return Profiles(default_root())


def option(pool: Pool, name: str) -> OptionValue:
    """The pool's value of an option of the emulated engine, its default where it is not set."""
    return pool.option(name, EMULATED.parameter(name).default)


def _key(pool: Pool, device: Device, model: ModelSpec) -> ReplicaKey:
    cache = "fp8" if option(pool, "kv_cache_dtype") == "fp8" else "bfloat16"
    sizes = pool.parallelism
    return ReplicaKey(
        model=model,
        system=device.name,
        engine=STANDS_FOR,
        layout=ReplicaLayout(tp=sizes.tp, pp=sizes.pp, dp=sizes.dp, ep=sizes.ep),
        precision=checkpoint_precision(model, cache=cache),
    )


def _by_speed_of_light(key: ReplicaKey, device: Device) -> GpuReplica:
    """A replica whose operations have no tables."""
    system = _system(device)
    costs = OperationCosts(TableStore(NO_TABLES, key.system, key.engine), system)
    traits = host_traits(key.engine)
    context = PlanContext(
        model=key.model,
        layout=key.layout,
        precision=key.precision,
        engine=key.engine,
        gpus_per_node=system.gpus_per_domain,
        module_formats=costs.module_formats(),
    )
    footprint = Footprint(
        model=key.model, layout=key.layout, precision=key.precision, system=system, memory_share=traits.memory_share
    )
    steps = HostedSteps(TableSteps(plan(context), costs), traits, key.model.num_layers)
    return GpuReplica(key=key, steps=steps, footprint=footprint, traits=traits)


def _system(device: Device) -> GpuSystem:
    """Facts of a GPU from its data sheet; small kernels at 0.8 of the bandwidth and 3 us, links in 10 us."""
    return GpuSystem(
        name=device.name,
        memory_bytes=device.memory_bytes,
        memory_bandwidth=device.memory_bandwidth,
        flops=device.flops,
        memory_efficiency=0.8,
        launch_s=3e-6,
        gpus_per_node=_NODE_GPUS,
        gpus_per_domain=_NODE_GPUS,
        link_bandwidth=device.link_bandwidth,
        network_bandwidth=device.network_bandwidth,
        hop_s=1e-5,
        reserve_bytes=3.5 * 2**30,
        comm_bytes={1: 0.0, 2: 0.35 * 2**30, 4: 0.4 * 2**30, 8: 0.4 * 2**30},
        nccl_version="",
        sm_version=0,
    )


def _memory(replica: GpuReplica, pool: Pool, problem: Problem) -> GpuMemory:
    """Bytes on each GPU; what a token takes is the mean over the longest request, as windows end the growth."""
    footprint = replica.footprint
    longest = np.array([float(problem.workload.longest_context)])
    step_tokens = np.array([float(option(pool, "max_num_batched_tokens"))])
    return GpuMemory(
        total_bytes=footprint.system.memory_bytes,
        weight_bytes=footprint.weight_bytes,
        fixed_bytes=float(footprint.fixed_bytes(step_tokens)[0]),
        kv_bytes_per_token=float(footprint.sequence_bytes(longest)[0] / longest[0]),
    )


def _hand_over(pool: Pool, config: ServingConfig, problem: Problem, replica: GpuReplica) -> HandOver | None:
    """Links between the pools of a disaggregated deployment: the GPUs of the smaller end carry a KV cache together."""
    if pool.role is Role.MIXED:
        return None
    longest = np.array([float(problem.workload.longest_context)])
    on_gpu = float(replica.footprint.sequence_bytes(longest)[0] / longest[0])
    devices = [problem.node_pool(other.node_pool).device for other in config.pools]
    same_node = len({other.node_pool for other in config.pools}) == 1
    speed = min(d.link_bandwidth if same_node else d.network_bandwidth for d in devices)
    ends = [other.parallelism.tp * other.parallelism.pp for other in config.pools]
    own = pool.parallelism.tp * pool.parallelism.pp
    return HandOver(bytes_per_token=on_gpu * own, bandwidth=speed * min(ends), latency_ms=HAND_OVER_MS)


def step_times(replica: GpuReplica, *, budget: int, seqs: int, context: int) -> StepTimes:
    """Step times of `replica` up to `budget` tokens and `seqs` sequences in a step and `context` tokens of context."""
    tokens, rows, contexts = _grid(1, budget), (0.0, *_grid(1, seqs)), _grid(1, context)
    decode = _sheet(replica, 0.0, rows, contexts)
    mixed = tuple(_sheet(replica, prompt, rows, contexts) for prompt in tokens)
    return StepTimes(
        tokens=tokens,
        seqs=rows,
        contexts=contexts,
        decode_ms=decode,
        mixed_ms=mixed,
        pair_ms=_pair_ms(replica, min(budget, max(context // 2, 2)), context),
    )


def _grid(low: int, high: int) -> Row:
    """Powers of two from `low` to `high`, which is at least two points."""
    top = max(high, low + 1)
    return (*(n for n in _DOUBLING if low <= n < top), float(top))


def _sheet(replica: GpuReplica, prompt: float, seqs: Row, contexts: Row) -> Sheet:
    """Milliseconds of steps with a prompt of `prompt` tokens, by decoding sequences and context."""
    down, across = np.meshgrid(np.array(seqs), np.array(contexts), indexing="ij")
    batch = step_batch(
        prefill_tokens=prompt,
        prefill_seqs=1.0 if prompt else 0.0,
        prompt=prompt,
        decode_seqs=down,
        decode_context=np.where(down > 0, across, 0.0),
    )
    return tuple(tuple(float(round(ms, 5)) for ms in row) for row in replica.steps.step_ms(batch))


def _pair_ms(replica: GpuReplica, tokens: int, context: int) -> float:
    """Milliseconds of a query-key pair: what a chunk takes more at the end of a long prompt than at its beginning."""
    start = max(context - tokens, 1)
    cached = np.array([0.0, float(start)])
    batch = step_batch(prefill_tokens=tokens, prefill_seqs=1.0, prompt=cached + tokens, cached=cached)
    first, later = replica.steps.step_ms(batch)
    return max(0.0, float(later - first) / (tokens * start))
