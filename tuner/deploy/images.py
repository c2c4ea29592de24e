"""Container images: those that the engines publish for a version, and one of our own for the engines that we bring."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.metadata import version

from search_spaces.errors import InvalidValueError
from search_spaces.hardware import DeviceKind
from tuner.deploy.chosen import Chosen
from tuner.deploy.render import OutFile, render

PUBLISHED = {
    "vllm": "docker.io/vllm/vllm-openai:v{version}",
    "sglang": "docker.io/lmsysorg/sglang:v{version}",
    "trtllm": "nvcr.io/nvidia/tensorrt-llm/release:{version}",
}
"""Where each project publishes the image of its server (their installation pages)."""
OUR_OWN = ("llamacpp", "emulated")
"""Engines that this package starts itself, so that an image with it is needed."""
_VERSION = re.compile(r"\d+\.\d+[\w.]*")


def our_image() -> str:
    """The image with this package, which holds the router too."""
    return f"tuner:{version('tuner')}"


def image_of(chosen: Chosen, wished: str | None) -> str:
    """`wished`, else the image of the measured version; raises `InvalidValueError` where that version has none."""
    if wished is not None:
        return wished
    engine = chosen.config.engine
    if engine in OUR_OWN:
        return our_image()
    pools = [chosen.problem.node_pool(pool.node_pool) for pool in chosen.config.pools]
    if any(pool.device.kind is DeviceKind.CPU for pool in pools):
        raise InvalidValueError(f"{engine} was measured on CPUs, and its published images are for GPUs; give --image")
    measured = measured_version(chosen)
    if measured is None or engine not in PUBLISHED:
        known = chosen.measurement.environment.get("engine_version", "unknown")
        raise InvalidValueError(f"the measured version of {engine} ({known}) has no published image; give --image")
    return PUBLISHED[engine].format(version=measured)


def measured_version(chosen: Chosen) -> str | None:
    """Number of the engine's version as measured, without a local label such as +cpu; None where it is unknown."""
    found = _VERSION.search(chosen.measurement.environment.get("engine_version", ""))
    return None if found is None else found[0]


def dockerfile(chosen: Chosen, images: Collection[str]) -> Iterator[OutFile]:
    """A Dockerfile for the image with this package, where it is among `images`."""
    if our_image() in images:
        environment = chosen.measurement.environment
        text = render(
            "Dockerfile.j2",
            image=our_image(),
            python=".".join(environment.get("python", "3.11").split(".")[:2]),
            extra="[llamacpp]" if chosen.config.engine == "llamacpp" else "",
        )
        yield OutFile(path="Dockerfile", text=text)
