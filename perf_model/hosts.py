"""What an engine adds to the kernels of a step on GPUs: host launches, scheduling and the admission of requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perf_model.batch import StepBatch
from perf_model.curves import Origin
from perf_model.numeric import FloatArray
from perf_model.steps import TableSteps
from search_spaces.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class HostTraits:
    """Constants of an engine on GPUs.

    A decode step takes `decode_factor` times its kernels, plus `step_ms`, plus `layer_ms` for each layer and
    `sequence_ms` for each sequence. A step with prompt tokens takes `prefill_factor` times its kernels plus `step_ms`,
    `prefill_layer_ms` for each layer and `sequence_ms` for each sequence, and never less than the decode step alone.
    `request_ms` passes between sending a request and its being queued, and between its first token and the client, and
    `latent_layer_ms` more for each layer of latent attention, whose prompts are launched kernel by kernel.
    A queued request is admitted every `admission_steps` steps, on average after half of them (`busy_admission_steps`
    from `busy_users` requests in flight, at least `parallel_admission_steps` where attention is data-parallel). Ranks
    whose prompts are computed in the same steps (`balances_ranks`) do not wait for each other's.
    `memory_share` of the GPU's memory may be used, and cache is reserved for a sequence's whole length where
    `reserves_whole`; a step computes `token_budget` tokens.
    """

    decode_factor: float
    prefill_factor: float
    step_ms: float
    layer_ms: float
    prefill_layer_ms: float
    sequence_ms: float
    request_ms: float
    admission_steps: float
    busy_admission_steps: float
    busy_users: float = 16.0
    parallel_admission_steps: float = 0.0
    latent_layer_ms: float = 0.0
    balances_ranks: bool = False
    memory_share: float = 0.90
    reserves_whole: bool = False
    token_budget: float = 8192.0

    def admission(self, users: FloatArray, dp: int) -> FloatArray:
        """Steps between admissions, by requests in flight on the replica and attention data-parallel ranks."""
        steps = np.where(users >= self.busy_users, self.busy_admission_steps, self.admission_steps)
        return np.maximum(steps, self.parallel_admission_steps) if dp > 1 else steps


# Fitted to the public measured runs of `silicon/measured_serving.csv` by `benchmarks/fit_hosts.py`, which prints them.
# TensorRT-LLM's decode runs faster than the sum of its kernels, since dependent launches overlap.
HOSTS: dict[str, HostTraits] = {
    "vllm": HostTraits(
        decode_factor=1.06,
        prefill_factor=0.919,
        step_ms=0.98,
        layer_ms=0.001,
        prefill_layer_ms=0.103,
        sequence_ms=0.0033,
        request_ms=40.0,
        admission_steps=1.0,
        busy_admission_steps=1.4,
        latent_layer_ms=0.75,
    ),
    "sglang": HostTraits(
        decode_factor=0.963,
        prefill_factor=1.0,
        step_ms=0.9,
        layer_ms=0.028,
        prefill_layer_ms=0.0,
        sequence_ms=0.0176,
        request_ms=150.0,
        admission_steps=1.0,
        busy_admission_steps=1.0,
        memory_share=0.95,
    ),
    "trtllm": HostTraits(
        decode_factor=0.782,
        prefill_factor=1.066,
        step_ms=0.87,
        layer_ms=0.0,
        prefill_layer_ms=0.0,
        sequence_ms=0.006,
        request_ms=18.4,
        latent_layer_ms=1.5,
        admission_steps=1.0,
        busy_admission_steps=2.0,
        parallel_admission_steps=89.0,
        balances_ranks=True,
        memory_share=0.95,
        reserves_whole=True,
    ),
}


def host_traits(engine: str, hosts: Mapping[str, HostTraits] = HOSTS) -> HostTraits:
    """Constants of `engine`; raises `InvalidValueError` with the known names."""
    if engine not in hosts:
        raise InvalidValueError(f"no GPU traits for engine {engine!r}; known are {', '.join(hosts)}")
    return hosts[engine]


@dataclass(frozen=True)
class HostedSteps:
    """Step times of an engine: its kernels from tables, and what its host adds."""

    kernels: TableSteps
    traits: HostTraits
    layers: int

    def step_ms(self, batch: StepBatch) -> FloatArray:
        """Duration of each step, in milliseconds; nothing to do takes no time."""
        kernels = self.kernels.step_ms(batch)
        traits = self.traits
        mixed = batch.prefill_tokens > 0
        decode = kernels * traits.decode_factor + (traits.step_ms + self.layers * traits.layer_ms)
        if not mixed.any():
            return np.where(batch.tokens > 0, decode + traits.sequence_ms * batch.decode_seqs, 0.0)
        fixed = traits.step_ms + self.layers * traits.prefill_layer_ms
        prefill = np.maximum(kernels * traits.prefill_factor + fixed, decode)
        time = np.where(mixed, prefill, decode) + traits.sequence_ms * batch.decode_seqs
        return np.where(batch.tokens > 0, time, 0.0)

    def breakdown_ms(self, batch: StepBatch) -> dict[str, FloatArray]:
        """Milliseconds by operation, and of the host (negative where launches overlap); they add up to `step_ms`."""
        parts = self.kernels.breakdown_ms(batch)
        return parts | {"host": self.step_ms(batch) - self.kernels.step_ms(batch)}

    def origins(self, batch: StepBatch) -> dict[Origin, float]:
        """Share of the kernels' time of a single step by where it comes from."""
        return self.kernels.origins(batch)
