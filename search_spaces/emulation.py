"""What an emulated engine is told of the hardware that it stands for: times, memory, links, noise and faults.

Plain values, and nothing heavy is imported: the emulated engine reads them at every start. The times are computed
elsewhere, by a performance model; here they are only looked up.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

from search_spaces.errors import require

Row = tuple[float, ...]
Sheet = tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Part of a prompt that a step computes: `tokens` tokens after `start` that are in the KV cache already."""

    tokens: int
    start: int = 0

    @property
    def pairs(self) -> float:
        """Query-key pairs of causal attention."""
        return self.tokens * (self.start + self.tokens / 2.0)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Milliseconds of engine steps of one rank set, on grids that are interpolated linearly.

    `decode_ms[i][j]` is a step in which `seqs[i]` sequences decode one token each at a mean context of `contexts[j]`.
    `mixed_ms[p][i][j]` computes one prompt of `tokens[p]` tokens besides; `seqs` begins with 0, so that
    `mixed_ms[p][0]` is a step without decoding. Other prompts than one that begins at its first token differ in
    query-key pairs, each of which takes `pair_ms`. Beyond its grid a table goes on as its last piece does.
    """

    tokens: Row
    seqs: Row
    contexts: Row
    decode_ms: Sheet
    mixed_ms: tuple[Sheet, ...]
    pair_ms: float = 0.0

    def __post_init__(self) -> None:
        for label in ("tokens", "seqs", "contexts"):
            grid = getattr(self, label)
            rising = all(a < b for a, b in pairwise(grid))
            require(len(grid) >= 2 and rising, f"{label}={grid} must be two or more rising numbers")
        require(self.seqs[0] == 0, f"seqs={self.seqs} must begin with 0: a step may compute prompts alone")
        shape = (len(self.seqs), len(self.contexts))
        require(_shape(self.decode_ms) == shape, f"decode_ms has shape {_shape(self.decode_ms)}, not {shape}")
        require(
            len(self.mixed_ms) == len(self.tokens), f"mixed_ms has {len(self.mixed_ms)} of {len(self.tokens)} sheets"
        )
        for sheet in self.mixed_ms:
            require(_shape(sheet) == shape, f"a sheet of mixed_ms has shape {_shape(sheet)}, not {shape}")
        require(self.pair_ms >= 0, f"pair_ms={self.pair_ms} must not be negative")

    def step_ms(self, prompts: Sequence[Chunk], seqs: int, context: float) -> float:
        """Milliseconds of a step that computes `prompts` and decodes `seqs` sequences at a mean `context`."""
        across = _place(self.contexts, context)
        down = _place(self.seqs, seqs)
        if not prompts:
            return max(0.0, _on_sheet(self.decode_ms, down, across)) if seqs else 0.0
        tokens = sum(chunk.tokens for chunk in prompts)
        low, share = _place(self.tokens, tokens)
        sheets = (self.mixed_ms[low], self.mixed_ms[low + 1])
        first, second = (_on_sheet(sheet, down, across) for sheet in sheets)
        together = first + share * (second - first)
        pairs = sum(chunk.pairs for chunk in prompts) - Chunk(tokens=tokens).pairs
        return max(together + self.pair_ms * pairs, 0.1 * together, 0.0)


def _shape(sheet: Sheet) -> tuple[int, int]:
    widths = {len(row) for row in sheet}
    return len(sheet), widths.pop() if len(widths) == 1 else -1


def _place(grid: Row, value: float) -> tuple[int, float]:
    """The piece of `grid` that holds `value` (the end pieces hold what is beyond) and how far along it is."""
    low = min(max(bisect_right(grid, value) - 1, 0), len(grid) - 2)
    return low, (value - grid[low]) / (grid[low + 1] - grid[low])


def _on_sheet(sheet: Sheet, down: tuple[int, float], across: tuple[int, float]) -> float:
    (row, down_share), (column, across_share) = down, across
    upper, lower = sheet[row], sheet[row + 1]
    first = upper[column] + across_share * (upper[column + 1] - upper[column])
    second = lower[column] + across_share * (lower[column + 1] - lower[column])
    return first + down_share * (second - first)


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Bytes on each GPU of a replica: what it holds, what weights and the engine itself take, and one token of KV."""

    total_bytes: float
    weight_bytes: float
    fixed_bytes: float
    kv_bytes_per_token: float

    def __post_init__(self) -> None:
        for label in ("total_bytes", "weight_bytes", "kv_bytes_per_token"):
            require(getattr(self, label) > 0, f"{label}={getattr(self, label)} must be above 0")
        require(self.fixed_bytes >= 0, f"fixed_bytes={self.fixed_bytes} must not be negative")

    def kv_tokens(self, share: float) -> int:
        """Tokens that the KV cache holds when the engine may use `share` of the memory; 0 where nothing is left."""
        room = self.total_bytes * share - self.weight_bytes - self.fixed_bytes
        return max(0, int(room / self.kv_bytes_per_token))


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """How a KV cache changes hands: `bytes_per_token` (all ranks) over a link, half the time at either end."""

    bytes_per_token: float
    bandwidth: float
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        require(self.bandwidth > 0, f"bandwidth={self.bandwidth} must be above 0")

    def half_ms(self, tokens: int) -> float:
        """Milliseconds that sending, or receiving, the cache of `tokens` tokens takes."""
        return (self.latency_ms + 1e3 * tokens * self.bytes_per_token / self.bandwidth) / 2.0


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of the natural logarithm of times: of each step, and of a launch as a whole."""

    step: float = 0.03
    launch: float = 0.02

    def __post_init__(self) -> None:
        for label in ("step", "launch"):
            value = getattr(self, label)
            require(0 <= value < 1, f"{label} noise={value} must be in [0, 1)")


class FaultKind(StrEnum):
    """What an emulated engine does wrong on request."""

    OUT_OF_MEMORY_AT_BOOT = "out_of_memory_at_boot"
    KV_CACHE_TOO_SMALL = "kv_cache_too_small"
    INVALID_FLAGS = "invalid_flags"
    CRASH_AT_BOOT = "crash_at_boot"
    HANG_AT_BOOT = "hang_at_boot"
    SLOW_START = "slow_start"
    PORT_IN_USE = "port_in_use"
    OUT_OF_MEMORY_UNDER_LOAD = "out_of_memory_under_load"
    CRASH_UNDER_LOAD = "crash_under_load"
    HANG_UNDER_LOAD = "hang_under_load"
    DEVICE_LOST = "device_lost"
    STOP_LISTENING = "stop_listening"
    DROP_STREAMS = "drop_streams"
    GARBAGE = "garbage"

    @property
    def is_of_configuration(self) -> bool:
        """True where the same configuration meets it again at every try; the others strike a trial by chance."""
        return self in _OF_CONFIGURATION


_OF_CONFIGURATION = frozenset(
    {
        FaultKind.OUT_OF_MEMORY_AT_BOOT,
        FaultKind.KV_CACHE_TOO_SMALL,
        FaultKind.INVALID_FLAGS,
        FaultKind.OUT_OF_MEMORY_UNDER_LOAD,
    }
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. Those under load strike with the request after `after_requests`; SLOW_START takes `seconds` more.

    DROP_STREAMS and GARBAGE strike a `share` of the requests from then on.
    """

    kind: FaultKind
    after_requests: int = 4
    seconds: float = 30.0
    share: float = 1.0

    def __post_init__(self) -> None:
        require(self.after_requests >= 0, f"after_requests={self.after_requests} must not be negative")
        require(self.seconds >= 0, f"seconds={self.seconds} of a fault must not be negative")
        require(0 < self.share <= 1, f"share={self.share} of a fault must be in (0, 1]")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault in `KIND` or `KIND:after_requests=8,seconds=2,share=0.5`; raises `InvalidValueError`."""
        name, _, rest = text.partition(":")
        kinds = [str(kind) for kind in FaultKind]
        require(name in kinds, f"fault {name!r} is unknown; choose {', '.join(kinds)}")
        values = {"after_requests": "4", "seconds": "30", "share": "1"}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            require(key in values, f"a fault has no {key!r}; give {', '.join(values)}")
            values[key] = value
        return cls(
            kind=FaultKind(name),
            after_requests=int(values["after_requests"]),
            seconds=float(values["seconds"]),
            share=float(values["share"]),
        )


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """Which trials meet a fault: each kind strikes its share of the configurations, or of the trials.

    The draw is a function of `seed` and of what it strikes, so that a study meets the same faults again.
    """

    shares: Mapping[FaultKind, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, share in self.shares.items():
            require(0 <= share <= 1, f"share={share} of fault {kind} must be in [0, 1]")

    def draw(self, *, config_key: str, trial: str) -> Fault | None:
        """The fault that `trial` meets with its configuration, None for a sound one."""
        for kind, share in self.shares.items():
            rng = random.Random(f"{self.seed}|{kind}|{config_key if kind.is_of_configuration else trial}")  # noqa: S311  no secret
            if rng.random() < share:
                return Fault(kind=kind, after_requests=rng.randrange(2, 12))
        return None


@dataclass(frozen=True, kw_only=True)
class EngineProfile:
    """A replica of an emulated engine: `gpus` GPUs called `gpu`, their step times, memory and links.

    `ranks` data-parallel ranks schedule requests each for itself, in step with each other where `lockstep`. A replica
    has `stages` pipeline stages, so that as many steps are under way together. A request takes `request_ms` before it
    is scheduled, a start `boot_s` seconds. `origin` says where the times come from.
    """

    gpu: str
    gpus: int
    times: StepTimes
    memory: GpuMemory
    hand_over: HandOver | None = None
    ranks: int = 1
    stages: int = 1
    lockstep: bool = False
    request_ms: float = 0.0
    boot_s: float = 0.0
    origin: str = ""

    def __post_init__(self) -> None:
        for label in ("gpus", "ranks", "stages"):
            require(getattr(self, label) >= 1, f"{label}={getattr(self, label)} must be at least 1")
        require(self.request_ms >= 0, f"request_ms={self.request_ms} must not be negative")
        require(self.boot_s >= 0, f"boot_s={self.boot_s} must not be negative")

    @cached_property
    def title(self) -> str:
        """The hardware in words."""
        return f"{self.gpus} x {self.gpu}"
