"""Speed of light, for what no table holds: time = max(arithmetic, memory traffic) at stated efficiencies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perf_model.numeric import FloatArray
from search_spaces.errors import require


@dataclass(frozen=True, kw_only=True)
class Roof:
    """What one rank can do: `flops` per second, `memory_bandwidth` in bytes per second, both already derated."""

    flops: float
    memory_bandwidth: float

    def __post_init__(self) -> None:
        require(self.flops > 0, f"flops={self.flops} must be above 0")
        require(self.memory_bandwidth > 0, f"memory_bandwidth={self.memory_bandwidth} must be above 0")

    def time_ms(self, flop: FloatArray, traffic_bytes: FloatArray) -> FloatArray:
        """Milliseconds for `flop` operations and `traffic_bytes` of memory traffic, whichever takes longer."""
        return 1e3 * np.maximum(flop / self.flops, traffic_bytes / self.memory_bandwidth)


def attention_pairs(tokens: FloatArray, seqs: FloatArray, context: FloatArray, window: int | None) -> FloatArray:
    """Query-key pairs of causal attention: `tokens` in `seqs` equal parts, each after `context` cached tokens.

    A query sees at most `window` keys. Without a window: tokens * (context + (tokens/seqs + 1) / 2).
    """
    length = tokens / np.maximum(seqs, 1.0)
    if window is None:
        return tokens * (context + (length + 1.0) / 2.0)
    growing = np.clip(window - context, 0.0, length)  # queries that see all keys before them
    pairs = growing * (context + (growing + 1.0) / 2.0) + (length - growing) * window
    return np.maximum(seqs, 1.0) * pairs
