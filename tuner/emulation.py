"""What the emulated engine is told of a deployment: step times, memory and links from the performance model.

The times are vLLM's by the operation tables where they are installed (the extra `silicon`), and else by the speed of
light of the GPU at the efficiency that the model assumes where no table helps; `EngineProfile.origin` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from perf_model.batch import step_batch
from perf_model.curves import Origin
from perf_model.gpu_groups import HANDOVER_MS, GpuGroups
from perf_model.serving_predictor import NO_TABLES
from perf_model.silicon import GpuReplica, ReplicaKey, Silicon
from search_spaces.emulation import EngineProfile, GpuMemory, HandOver, Row, Sheet, StepTimes
from search_spaces.engines.emulated import EMULATED
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import DeviceKind
from search_spaces.model import MoeFeedForward
from search_spaces.problem import Problem
from search_spaces.serving import OptionValue, Pool, Role, ServingConfig

_DOUBLING = tuple(2.0**n for n in range(18))


@dataclass(frozen=True)
class Profiles:
    """Makes profiles; tables and replicas are read once. `root` holds operation tables, None for the speed of light."""

    root: Path | None

    @cached_property
    def _silicon(self) -> Silicon:
        return Silicon(self.root or NO_TABLES)

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
        return GpuGroups(problem, self._silicon, 1.0).replica(EMULATED.name, pool)

    def memory(self, pool: Pool, problem: Problem) -> GpuMemory:
        """Bytes on each GPU of a replica; raises as `replica`."""
        return _memory(self.replica(pool, problem), pool, problem)

    def hand_over(self, pool: Pool, config: ServingConfig, problem: Problem) -> HandOver | None:
        """How the KV caches of `pool` change hands, None where they do not; raises as `replica`."""
        return _hand_over(pool, config, problem, self.replica(pool, problem))

    def _profile(self, pool: Pool, config: ServingConfig, problem: Problem) -> EngineProfile:
        replica = self.replica(pool, problem)
        layout, model = replica.key.layout, problem.model
        return EngineProfile(
            gpu=replica.key.system,
            gpus=layout.ranks,
            times=self._times(replica, pool, problem),
            memory=self.memory(pool, problem),
            hand_over=self.hand_over(pool, config, problem),
            ranks=layout.dp,
            stages=layout.pp,
            lockstep=layout.dp > 1 and any(isinstance(g.feed_forward, MoeFeedForward) for g in model.layers),
            request_ms=replica.request_ms,
            origin=_origin(replica, problem),
        )

    def _times(self, replica: GpuReplica, pool: Pool, problem: Problem) -> StepTimes:
        sizes = (option(pool, "max_num_batched_tokens"), option(pool, "max_num_seqs"), problem.workload.longest_context)
        budget, seqs, context = (int(size) for size in sizes)
        key = (replica.key, budget, seqs, context)
        if key not in self._made:
            self._made[key] = step_times(replica, budget=budget, seqs=seqs, context=context)
        return self._made[key]


def option(pool: Pool, name: str) -> OptionValue:
    """The pool's value of an option of the emulated engine, its default where it is not set."""
    return pool.option(name, EMULATED.parameter(name).default)


def _origin(replica: GpuReplica, problem: Problem) -> str:
    """Where the times of a decode step come from, in words."""
    shares = replica.steps.origins(step_batch(decode_seqs=[8.0], decode_context=[float(problem.workload.isl.mean)]))
    by_table = 1.0 - shares[Origin.ROOFLINE]
    if by_table == 0.0:
        return "speed of light, no operation tables"
    return f"{replica.key.engine}'s operation tables for {by_table:.0%} of a decode step, speed of light for the rest"


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
    return HandOver(bytes_per_token=on_gpu * own, bandwidth=speed * min(ends), latency_ms=HANDOVER_MS)


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
