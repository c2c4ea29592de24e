"""Facts of a GPU system from `systems/<name>.yaml` of an operation-table directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from search_spaces.errors import InvalidValueError, require


@dataclass(frozen=True, kw_only=True)
class GpuSystem:
    """One kind of node. FLOP/s are dense; bandwidths are bytes/s for one GPU in one direction.

    `memory_efficiency` and `launch_s` describe small memory-bound kernels: bytes / (efficiency * bandwidth) + launch.
    Links have `link_bandwidth` up to `gpus_per_domain` GPUs and `network_bandwidth` beyond.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    flops: Mapping[str, float]
    memory_efficiency: float
    launch_s: float
    gpus_per_node: int
    gpus_per_domain: int
    link_bandwidth: float
    network_bandwidth: float
    hop_s: float
    reserve_bytes: float
    comm_bytes: Mapping[int, float]
    nccl_version: str
    sm_version: int

    def __post_init__(self) -> None:
        require(self.memory_bandwidth > 0, f"memory_bandwidth={self.memory_bandwidth} of {self.name} must be above 0")
        require("bf16" in self.flops, f"system {self.name} names no bf16 FLOP/s; it has {', '.join(self.flops)}")

    def peak(self, precision: str) -> float:
        """FLOP/s at `precision`; a precision that the GPU lacks runs at half the width that it has (or bf16)."""
        fallback = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "fp32": "bf16"}
        name = precision
        while name not in self.flops:
            name = fallback[name]
        return self.flops[name]

    def memory_ms(self, traffic_bytes: float) -> float:
        """Milliseconds of a small kernel that moves `traffic_bytes`."""
        return 1e3 * (traffic_bytes / (self.memory_efficiency * self.memory_bandwidth) + self.launch_s)


def read_system(root: Path, name: str) -> GpuSystem:
    """System `name` below `root`; raises `InvalidValueError` with the systems that there are."""
    file = root / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in root.glob("*_*.yaml"))) or "none"
        raise InvalidValueError(f"system {name!r} has no {file}; known are {known}")
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    gpu, node, misc = raw["gpu"], raw["node"], raw.get("misc", {})
    precisions = {"bf16": "bfloat16", "fp8": "fp8", "int8": "int8", "fp4": "fp4", "fp32": "float32"}
    in_rack = node.get("num_gpus_per_rack", 0)
    return GpuSystem(
        name=name,
        memory_bytes=float(gpu["mem_capacity"]),
        memory_bandwidth=float(gpu["mem_bw"]),
        flops={
            short: float(gpu[f"{long}_tc_flops"]) for short, long in precisions.items() if f"{long}_tc_flops" in gpu
        },
        memory_efficiency=float(gpu.get("mem_bw_empirical_scaling_factor", 0.8)),
        launch_s=float(gpu.get("mem_empirical_constant_latency", 3e-6)),
        gpus_per_node=int(node["num_gpus_per_node"]),
        gpus_per_domain=int(in_rack or node["num_gpus_per_node"]),
        link_bandwidth=float(node["intra_node_bw"]),
        network_bandwidth=float(node["inter_rack_bw"] if in_rack else node["inter_node_bw"]),
        hop_s=float(node.get("p2p_latency", 1e-5)),
        reserve_bytes=float(misc.get("other_mem", 3.5 * 2**30)),
        comm_bytes={int(k): float(v) for k, v in misc.get("nccl_mem", {}).items()},
        nccl_version=str(misc.get("nccl_version", "")),
        sm_version=int(gpu.get("sm_version") or 0),
    )
