"""Step times of the embedded engine (llama.cpp) on CPU cores, from the roofline of a measured core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perf_model.batch import StepBatch
from perf_model.curves import Origin
from perf_model.engine_traits import EngineTraits
from perf_model.numeric import FloatArray
from perf_model.roofline import Roof, attention_pairs
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import Device
from search_spaces.model import Attention, LayerGroup, ModelSpec

KV_BYTES = {"f16": 2.0, "q8_0": 34.0 / 32.0, "f32": 4.0}  # q8_0: 32 bytes and a 2-byte scale for 32 elements
ACTIVATION_BYTES = 4.0


@dataclass(frozen=True, kw_only=True)
class EmbeddedSteps:
    """Step times of one replica on `cores` cores; weights are read again for every `ubatch_size` tokens of a step."""

    model: ModelSpec
    device: Device
    traits: EngineTraits
    cores: int
    ubatch_size: int
    kv_cache_dtype: str

    def step_ms(self, batch: StepBatch) -> FloatArray:
        """Duration of a step, in milliseconds."""
        return np.asarray(sum(self.breakdown_ms(batch).values()))

    def breakdown_ms(self, batch: StepBatch) -> dict[str, FloatArray]:
        """Milliseconds by operation."""
        gemm = np.zeros(batch.tokens.shape)
        attention = np.zeros(batch.tokens.shape)
        for group in self.model.layers:
            gemm = gemm + group.count * self._layer_gemm_ms(group, batch)
            attention = attention + group.count * self._layer_attention_ms(group, batch)
        head = self._product_ms(batch.outputs, float(self.model.vocab_size * self.model.hidden_size))
        fixed = self.traits.step_ms * (batch.tokens > 0) + self.traits.sequence_ms * batch.outputs
        return {"gemm": gemm, "attention": attention, "logits": head, "overhead": fixed}

    def origins(self, _batch: StepBatch) -> dict[Origin, float]:
        """Share of a step's time by where it comes from: all of it from the roofline."""
        return {origin: float(origin is Origin.ROOFLINE) for origin in Origin}

    @property
    def _weight_bytes(self) -> float:
        return self.model.weight_bits / 8.0

    def _roof(self, efficiency: float) -> Roof:
        speedup = self.cores**self.traits.thread_exponent
        peak = self.device.flops.get("fp32") or max(self.device.flops.values())
        return Roof(
            flops=peak * efficiency * speedup,
            memory_bandwidth=self.device.memory_bandwidth * self.traits.memory_efficiency * speedup,
        )

    def _layer_gemm_ms(self, group: LayerGroup, batch: StepBatch) -> FloatArray:
        hidden = self.model.hidden_size
        weights = group.attention.parameters(hidden) + group.feed_forward.parameters(hidden)
        return self._product_ms(batch.tokens, float(weights))

    def _product_ms(self, rows: FloatArray, weights: float) -> FloatArray:
        """`rows` tokens times matrices of `weights` weights.

        Few rows reach a fraction rows / (rows + half) of the arithmetic rate, but never take longer than one at a time.
        """
        roof = self._roof(self.traits.gemm_efficiency)
        once = roof.time_ms(np.zeros_like(rows), np.full_like(rows, weights * self._weight_bytes))
        reads = once * np.ceil(rows / self.ubatch_size)
        arithmetic = roof.time_ms(2.0 * weights * (rows + self.traits.half_rate_rows), np.zeros_like(rows))
        return np.where(rows > 0, np.maximum(reads, np.minimum(rows * once, arithmetic)), 0.0)

    def _layer_attention_ms(self, group: LayerGroup, batch: StepBatch) -> FloatArray:
        attention = group.attention
        if not isinstance(attention, Attention):
            raise InvalidValueError(
                f"{type(attention).__name__} of model {self.model.name!r} is not modelled on the embedded engine; "
                "choose a model with grouped-query attention"
            )
        new = batch.prefill_seqs * (batch.prompt - batch.cached)
        pairs = batch.prompt_share * attention_pairs(new, batch.prefill_seqs, batch.cached, attention.window)
        seen = batch.decode_context
        if attention.window is not None:
            seen = np.minimum(seen, attention.window)
        decode_pairs = batch.decode_seqs * seen
        flop = 4.0 * attention.heads * attention.head_dim * (pairs + decode_pairs)
        keys = decode_pairs + batch.prefill_seqs * (batch.cached + batch.prompt) / 2.0 + batch.prefill_tokens
        traffic = attention.kv_elements_per_token * KV_BYTES[self.kv_cache_dtype] * keys
        return self._roof(self.traits.attention_efficiency).time_ms(flop, traffic)
