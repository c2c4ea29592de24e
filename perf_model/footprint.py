"""Memory of one rank on a GPU: weights, KV cache, activations and buffers, and how many sequences fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perf_model.layout import ReplicaLayout
from perf_model.memory import MemoryNeed
from perf_model.numeric import FloatArray
from perf_model.precision import CACHE_BYTES, FORMATS, Precision
from perf_model.systems import GpuSystem
from search_spaces.model import Attention, LayerGroup, LinearAttention, ModelSpec, MoeFeedForward

# Widths of live activations per token, in hidden sizes: residual, normed input, block input and output, with slack for
# the attention workspace. The reference's coefficients are of the same size (8 to 12).
ACTIVATION_WIDTHS = 10.0
STATE_BYTES = 4.0  # recurrent states of linear attention are kept in fp32


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one rank of `layout`. `memory_share` of the GPU's memory may be used, weights included."""

    model: ModelSpec
    layout: ReplicaLayout
    precision: Precision
    system: GpuSystem
    memory_share: float

    @property
    def weight_bytes(self) -> float:
        """Weights of one rank."""
        layers = sum(group.count * self._layer_bytes(group) for group in self.model.layers)
        tables = 1 if self.model.tied_embeddings else 2
        embeddings = tables * self.model.vocab_size * self.model.hidden_size * FORMATS["bfloat16"].weight_bytes
        return layers / self.layout.pp + embeddings / self.layout.tp / (1 if self.layout.pp == 1 else 2)

    def _layer_bytes(self, group: LayerGroup) -> float:
        hidden, tp = self.model.hidden_size, self.layout.tp
        attention = group.attention.parameters(hidden) * FORMATS[self.precision.projections].weight_bytes / tp
        block = group.feed_forward
        if not isinstance(block, MoeFeedForward):
            return attention + block.parameters(hidden) * FORMATS[self.precision.gemm].weight_bytes / tp
        experts = block.expert_parameters(hidden) * FORMATS[self.precision.moe].weight_bytes
        shared = 3 * hidden * block.shared_intermediate_size * FORMATS[self.precision.gemm].weight_bytes
        router = hidden * block.experts * FORMATS["bfloat16"].weight_bytes
        return attention + experts / self.layout.stage_ranks + shared / tp + router

    def sequence_bytes(self, tokens: FloatArray) -> FloatArray:
        """KV cache and state of one sequence of `tokens` tokens; windows end the growth of their layers."""
        per_element = CACHE_BYTES[self.precision.cache]
        total = np.zeros_like(tokens)
        for group in self.model.layers:
            attention = group.attention
            if isinstance(attention, LinearAttention):
                total = total + group.count * attention.state_elements / self.layout.tp * STATE_BYTES
                continue
            kept = np.minimum(tokens, attention.window) if attention.window else tokens
            elements = float(attention.kv_elements_per_token)
            if isinstance(attention, Attention):
                elements = 2.0 * -(-attention.kv_heads // self.layout.tp) * attention.head_dim
            total = total + group.count * elements * per_element * kept
        return total / self.layout.pp

    def fixed_bytes(self, step_tokens: FloatArray) -> FloatArray:
        """Activations of a step of `step_tokens` tokens, communication buffers and the engine's reserve."""
        ranks = max((r for r in self.system.comm_bytes if r <= self.layout.stage_ranks), default=1)
        buffers = self.system.comm_bytes.get(ranks, 0.0) + self.system.reserve_bytes
        return 2.0 * ACTIVATION_WIDTHS * self.model.hidden_size * step_tokens + buffers

    def most_sequences(self, tokens: FloatArray, step_tokens: FloatArray) -> FloatArray:
        """The largest number of sequences of `tokens` tokens on a rank; below 1 where even one does not fit."""
        room = self.system.memory_bytes * self.memory_share - self.weight_bytes - self.fixed_bytes(step_tokens)
        return np.asarray(self.layout.pp * np.maximum(room, 0.0) / self.sequence_bytes(tokens) / self.layout.pp)

    def need(self, sequences: FloatArray, tokens: FloatArray, step_tokens: FloatArray) -> MemoryNeed:
        """Bytes that `sequences` sequences of `tokens` tokens need on a rank."""
        buffers = self.fixed_bytes(np.zeros_like(step_tokens))
        return MemoryNeed(
            weight_bytes=np.full_like(tokens, self.weight_bytes),
            kv_bytes=sequences * self.sequence_bytes(tokens),
            activation_bytes=self.fixed_bytes(step_tokens) - buffers,
            reserve_bytes=buffers,
            capacity_bytes=np.full_like(tokens, self.system.memory_bytes * self.memory_share),
        )
