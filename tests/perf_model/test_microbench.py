"""The micro-benchmark of a node."""

from __future__ import annotations

from perf_model.microbench import device_from_figures, measure_node
from search_spaces.hardware import DeviceKind


def test_a_node_is_measured_and_becomes_a_device() -> None:
    figures = measure_node(seconds=0.02, megabytes=8)
    device = device_from_figures(figures)
    assert device.kind is DeviceKind.CPU
    assert 1e8 < device.flops["fp32"] < 1e13
    assert 1e8 < device.memory_bandwidth < 1e13
    assert device.memory_bytes * figures["cores"] == figures["memory_bytes"]
    assert device.link_bandwidth > 1e6
    assert device.network_bandwidth > 1e6
