"""What the users of the served model send, and how hard."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from search_spaces.errors import require


@dataclass(frozen=True, kw_only=True)
class Length:
    """Sequence length in tokens, uniform in `mean * (1 - spread) .. mean * (1 + spread)`."""

    mean: int
    spread: float = 0.0

    def __post_init__(self) -> None:
        require(self.mean >= 1, f"length mean={self.mean} must be at least 1 token")
        require(0 <= self.spread < 1, f"length spread={self.spread} must be in [0, 1)")

    @property
    def shortest(self) -> int:
        """Shortest length, in tokens, at least 1."""
        return max(1, round(self.mean * (1 - self.spread)))

    @property
    def longest(self) -> int:
        """Longest length, in tokens."""
        return max(self.shortest, round(self.mean * (1 + self.spread)))


class Arrival(StrEnum):
    """How requests arrive: `closed` keeps a number of requests in flight; the others are open loops."""

    CLOSED = "closed"
    POISSON = "poisson"
    CONSTANT = "constant"

    @property
    def is_open(self) -> bool:
        """True where requests arrive at a rate, whatever the server does."""
        return self is not Arrival.CLOSED

    @property
    def load_unit(self) -> str:
        """`request_rate` (requests/s) for an open loop, `concurrency` (requests in flight) for a closed one."""
        return "request_rate" if self.is_open else "concurrency"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests with input length `isl` and output length `osl`.

    `shared_prefix` is the share of the input that all requests have in common.
    """

    isl: Length
    osl: Length
    arrival: Arrival = Arrival.CLOSED
    shared_prefix: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.shared_prefix <= 1, f"shared_prefix={self.shared_prefix} must be in [0, 1]")
        require(self.osl.shortest >= 2, f"osl shortest={self.osl.shortest} must be at least 2 tokens: TPOT needs two")

    @property
    def longest_context(self) -> int:
        """Most tokens that one request can hold."""
        return self.isl.longest + self.osl.longest


@dataclass(frozen=True, kw_only=True)
class Load:
    """How hard: requests in flight where `arrival` is closed, else requests per second."""

    arrival: Arrival
    value: float

    def __post_init__(self) -> None:
        require(self.value > 0, f"{self.arrival.load_unit}={self.value} must be above 0")
        if not self.arrival.is_open:
            require(float(self.value).is_integer(), f"concurrency={self.value} must be a whole number")

    @property
    def concurrency(self) -> int | None:
        """Requests in flight, None for an open loop."""
        return None if self.arrival.is_open else int(self.value)

    @property
    def request_rate(self) -> float | None:
        """Requests per second, None for a closed loop."""
        return self.value if self.arrival.is_open else None

    def __str__(self) -> str:
        return f"{self.arrival.load_unit}={self.value:g}"
