"""What runs on a node for a collection: it looks at the node, and times kernels there."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from perf_model.collect import AttentionShape, Bench, GemmShape, NumpyBench, TorchBench, measure, timed

COPY_BYTES = tuple(2**n for n in range(12, 31))


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """What a node can time; `problem` says why it cannot, empty where it can."""

    device: str = ""
    library: str = ""
    version: str = ""
    problem: str = ""


def kernel_facts(bench: str) -> KernelFacts:
    """Look at the node that this runs on."""
    if bench == "numpy":
        return KernelFacts(device=NumpyBench.name, library="numpy", version=np.__version__)
    if importlib.util.find_spec("torch") is None:
        return KernelFacts(problem="torch is not installed in the node's Python; install it there, with CUDA")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return KernelFacts(problem=f"torch {torch.__version__} sees no GPU there; is it a build with CUDA?")
    return KernelFacts(device=torch.cuda.get_device_name(0), library="torch", version=version("torch"))


def measure_shapes(bench: str, shapes: Sequence[GemmShape | AttentionShape], seconds: float) -> list[float]:
    """Milliseconds of each shape; repeats that scatter are measured again (`perf_model.collect.measure`)."""
    made = _bench(bench)
    return [measure(made, shape, seconds) for shape in shapes]


def _bench(name: str) -> Bench:
    return NumpyBench() if name == "numpy" else TorchBench("cuda")


def measure_copies(bench: str, sizes: Sequence[int], seconds: float) -> list[float]:
    """Milliseconds of a kernel that reads and writes so that `sizes` bytes move in all."""
    made = _bench(bench)
    return [timed(made, _copy(bench, size), seconds) for size in sizes]


def _copy(bench: str, size: int) -> Callable[[], object]:
    if bench == "numpy":
        source, target = np.zeros(size // 2, dtype=np.uint8), np.zeros(size // 2, dtype=np.uint8)
        return lambda: np.copyto(target, source)
    torch = importlib.import_module("torch")
    data = torch.zeros(2, max(size // 2, 1), dtype=torch.uint8, device="cuda")
    return lambda: data[0].copy_(data[1])


def fit_copies(sizes: Sequence[float], times_ms: Sequence[float], bandwidth: float) -> tuple[float, float]:
    """Share of `bandwidth` that large copies reach, and the seconds that a copy takes whatever its size.

    The share is that of the largest copy, at most 1; the constant is the shortest time, less its bytes.
    """
    largest = int(np.argmax(sizes))
    smallest = int(np.argmin(sizes))
    share = min(sizes[largest] / (times_ms[largest] * 1e-3) / bandwidth, 1.0)
    launch_s = max(times_ms[smallest] * 1e-3 - sizes[smallest] / (share * bandwidth), 1e-7)
    return float(share), float(launch_s)
