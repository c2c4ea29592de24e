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
class RateSearch:
    """Instead of a load that is given: the highest request rate that meets every SLO, between two rates per second.

    It is found as an interval from a rate that was met to one that was not, no wider than `1 + tolerance` as a factor.
    """

    lowest: float
    highest: float
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        require(self.lowest > 0, f"rate_search min={self.lowest} must be above 0 requests/s")
        require(self.highest > self.lowest, f"rate_search max={self.highest} must be above min={self.lowest}")
        require(0 < self.tolerance <= 1, f"rate_search tolerance={self.tolerance} must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests with input length `isl` and output length `osl`.

    `shared_prefix` is the share of the input that all requests have in common. With a `rate_search` every trial looks
    for the highest rate that its deployment serves; the load of its candidate is then the upper end of the search.
    """

    isl: Length
    osl: Length
    arrival: Arrival = Arrival.CLOSED
    shared_prefix: float = 0.0
    rate_search: RateSearch | None = None

    def __post_init__(self) -> None:
        require(
            self.rate_search is None or self.arrival.is_open,
            f"rate_search looks for a request rate, and arrival={self.arrival} has none; choose poisson or constant",
        )
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
