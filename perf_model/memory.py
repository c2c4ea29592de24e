"""Memory of one replica: weights, KV cache, activations and the engine's reserve, against what its devices hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perf_model.numeric import BoolArray, FloatArray


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that one rank needs, and `capacity_bytes` that it may use; arrays over configurations."""

    weight_bytes: FloatArray
    kv_bytes: FloatArray
    activation_bytes: FloatArray
    reserve_bytes: FloatArray
    capacity_bytes: FloatArray

    @property
    def total_bytes(self) -> FloatArray:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.reserve_bytes

    @property
    def fits(self) -> BoolArray:
        """True where the need is at most the capacity."""
        return np.asarray(self.total_bytes <= self.capacity_bytes)

    def explain(self, index: int) -> str:
        """Why configuration `index` does not fit, with the figures in GiB."""
        gib = 2.0**30
        parts = {
            "weights": self.weight_bytes,
            "KV cache": self.kv_bytes,
            "activations": self.activation_bytes,
            "reserve": self.reserve_bytes,
        }
        text = ", ".join(f"{name} {array.flat[index] / gib:.2f}" for name, array in parts.items())
        total, capacity = self.total_bytes.flat[index] / gib, self.capacity_bytes.flat[index] / gib
        return (
            f"out of memory: a rank needs {total:.2f} GiB ({text}) but has {capacity:.2f} GiB; "
            "use more devices for a replica, fewer sequences or a smaller KV cache type"
        )
