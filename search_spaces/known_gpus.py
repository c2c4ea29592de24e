"""GPUs by name, from their makers' data sheets: dense FLOP/s, bytes, and bytes/s for each direction.

`network_bandwidth` is what a node of the maker's reference design gives each GPU (one network adapter for each).
Names are those of the operation tables that the performance model reads.
"""

from __future__ import annotations

from difflib import get_close_matches

from search_spaces.errors import InvalidValueError
from search_spaces.hardware import Device, DeviceKind

_GIB = 2.0**30


def _gpu(
    name: str, *, memory: float, bandwidth: float, link: float, network: float, power: float, flops: dict[str, float]
) -> Device:
    return Device(
        name=name,
        kind=DeviceKind.GPU,
        memory_bytes=memory * _GIB,
        memory_bandwidth=bandwidth,
        flops=flops,
        link_bandwidth=link,
        network_bandwidth=network,
        power_w=power,
    )


_HOPPER = {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12, "fp32": 67e12}
_ADA = {"bf16": 362e12, "fp8": 733e12, "int8": 733e12, "fp32": 91.6e12}
_BLACKWELL = {"bf16": 2250e12, "fp8": 4500e12, "int8": 4500e12, "fp4": 9000e12, "fp32": 80e12}
# GeForce GPUs accumulate in FP32 at half the rate of their advertised FP16 and FP8 figures; joined by PCIe, 25 GbE.
_RTX_4090 = {"bf16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12, "fp32": 82.6e12}
_RTX_5090 = {"bf16": 209.5e12, "fp8": 419e12, "int8": 838e12, "fp4": 1676e12, "fp32": 104.8e12}

GPUS: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu(
            "a100_sxm",
            memory=80,
            bandwidth=2.039e12,
            link=300e9,
            network=25e9,
            power=400,
            flops={"bf16": 312e12, "int8": 624e12, "fp32": 19.5e12},
        ),
        _gpu("h100_sxm", memory=80, bandwidth=3.35e12, link=450e9, network=50e9, power=700, flops=_HOPPER),
        _gpu("h200_sxm", memory=141, bandwidth=4.8e12, link=450e9, network=50e9, power=700, flops=_HOPPER),
        _gpu("b200_sxm", memory=180, bandwidth=8.0e12, link=900e9, network=50e9, power=1000, flops=_BLACKWELL),
        _gpu("l40s", memory=48, bandwidth=0.864e12, link=32e9, network=25e9, power=350, flops=_ADA),
        _gpu("rtx_4090", memory=24, bandwidth=1.008e12, link=32e9, network=3.1e9, power=450, flops=_RTX_4090),
        _gpu("rtx_5090", memory=32, bandwidth=1.792e12, link=64e9, network=3.1e9, power=575, flops=_RTX_5090),
    )
}


def known_gpu(name: str) -> Device:
    """The GPU called `name`; raises `InvalidValueError` with the known names."""
    if name in GPUS:
        return GPUS[name]
    near = get_close_matches(name, GPUS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InvalidValueError(f"GPU {name!r} is unknown; {hint}choose {', '.join(GPUS)}")
