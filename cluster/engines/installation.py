"""Where an engine that lives apart from this tool is installed on the nodes of a pool."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

from search_spaces.errors import InvalidValueError
from search_spaces.hardware import DeviceKind
from search_spaces.serving import Pool

PROGRAMS: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm",),
    "sglang": ("python3", "-m", "sglang.launch_server"),
    "trtllm": ("trtllm-serve",),
}
"""What starts each engine where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """An engine on the nodes of a pool.

    `device` is what the pool's devices are, `command` the words that start the engine (empty for its own program on the
    path), `env` what it wants in its environment, `draft_model` what speculative decoding with a second model loads.
    """

    device: DeviceKind
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    draft_model: str | None = None

    @property
    def on_gpu(self) -> bool:
        """True where the engine runs on GPUs."""
        return self.device is DeviceKind.GPU

    def program(self, engine: str) -> tuple[str, ...]:
        """The words that start `engine`."""
        return self.command or PROGRAMS[engine]


Installations = Mapping[str, Installation]
"""Installations by node pool."""


def installation_of(installations: Installations, pool: Pool) -> Installation:
    """Where replicas of `pool` find their engine; raises `InvalidValueError` for an unknown node pool."""
    if pool.node_pool not in installations:
        known = ", ".join(installations) or "none"
        raise InvalidValueError(f"no engine is installed on node pool {pool.node_pool!r}; known are {known}")
    return installations[pool.node_pool]


def missing_program(engine: str, installation: Installation) -> str | None:
    """Why `engine` cannot be started on this machine; None where its program is here."""
    word = installation.program(engine)[0]
    if shutil.which(word) is not None:
        return None
    return f"the engine {engine} is not installed here: {word} is no program that can be run"


def side_port(port: int) -> int:
    """The port on which a replica that serves on `port` meets its peers: KV hand-over, bootstrap.

    A function of the port alone, so that whoever knows a replica's URL knows both. Ports that the kernel hands out
    (32768 and up on Linux) go below its range, others above.
    """
    return port - 20_000 if port >= 32_768 else port + 10_000
