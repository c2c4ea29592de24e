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
    """How requests arrive: `closed` keeps a number of requests in flight; the others are open loops.

    In a `trace` the gaps are recorded ones, scaled so that the mean rate is that of the load.
    """

    CLOSED = "closed"
    POISSON = "poisson"
    CONSTANT = "constant"
    TRACE = "trace"

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
class Conversation:
    """Several requests in turn, each with all that was said before: `new_isl` tokens come with every turn.

    The first `shared_prefix` (share) of the first turn is common to all conversations. The next turn is sent when the
    answer has ended and `think_time_s` has passed. Its prompt holds tokens that are drawn in place of the answers,
    since servers answer with text: a prefix cache knows all of it but those and what is new.
    """

    turns: Length
    new_isl: Length
    osl: Length
    shared_prefix: float = 0.0
    think_time_s: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.shared_prefix <= 1, f"shared_prefix={self.shared_prefix} must be in [0, 1]")
        require(self.think_time_s >= 0, f"think_time_s={self.think_time_s} must not be negative")
        require(self.turns.longest >= 2, f"turns mean={self.turns.mean} is no conversation; give at least 2")

    @property
    def longest_context(self) -> int:
        """Most tokens that the last turn can hold."""
        return self.turns.longest * (self.new_isl.longest + self.osl.longest)

    @property
    def inputs(self) -> tuple[float, float]:
        """Mean input tokens of a request, over all turns, and how many of them an earlier request held."""
        turns = self.turns.mean
        held = self._inputs_of_first(turns - 1) + self.shared_prefix * self.new_isl.mean
        return self._inputs_of_first(turns) / turns, held / turns

    def _inputs_of_first(self, turns: int) -> float:
        """Input tokens of the first `turns` requests together: the k-th holds k new texts and k - 1 answers."""
        return turns * (turns + 1) / 2 * self.new_isl.mean + turns * (turns - 1) / 2 * self.osl.mean

    def workload(self, arrival: Arrival) -> Workload:
        """The workload of such conversations: its input length is that of the requests as they are sent."""
        mean, held = self.inputs
        return Workload(
            isl=around(mean, self.new_isl.shortest),
            osl=self.osl,
            arrival=arrival,
            shared_prefix=held / mean,
            conversation=self,
        )


class TraceFormat(StrEnum):
    """Formats of recorded requests: Mooncake's JSON lines, and the CSV files of Azure's LLM inference traces."""

    MOONCAKE = "mooncake"
    AZURE = "azure"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Recorded requests to replay: those of `window_s` seconds from `start_s` on, in the time of the recording.

    Requests of more than `longest` tokens (input and output) are left out. What the file holds of that is stated here,
    so that nobody needs the file to reason about it: `requests` in the window, their own mean `request_rate` per
    second, and the `longest_context` among them in tokens.
    """

    file: str
    format: TraceFormat
    start_s: float = 0.0
    window_s: float | None = None
    longest: int | None = None
    requests: int
    request_rate: float
    longest_context: int

    def __post_init__(self) -> None:
        require(self.requests >= 2, f"the trace {self.file} has {self.requests} requests there; it takes at least 2")
        require(self.request_rate > 0, f"request_rate={self.request_rate} of trace {self.file} must be above 0")


def around(mean: float, shortest: int) -> Length:
    """A length with this mean whose range begins near `shortest`: what is uneven is taken for uniform."""
    whole = max(1, round(mean))
    return Length(mean=whole, spread=min(0.99, max(0.0, 1 - shortest / whole)))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests with input length `isl` and output length `osl`.

    `shared_prefix` is the share of the input that all requests have in common. With a `rate_search` every trial looks
    for the highest rate that its deployment serves; the load of its candidate is then the upper end of the search.
    Requests of a `conversation`, or of a `trace`, have their contents from there: the lengths are then means over all
    requests, and `shared_prefix` is the share of the input that some request before held.
    """

    isl: Length
    osl: Length
    arrival: Arrival = Arrival.CLOSED
    shared_prefix: float = 0.0
    rate_search: RateSearch | None = None
    conversation: Conversation | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        require(
            (self.trace is not None) == (self.arrival is Arrival.TRACE),
            f"arrival={self.arrival} does not go with trace={self.trace}; requests of a trace arrive as in the trace",
        )
        require(self.trace is None or self.conversation is None, "a trace has its own conversations; give one of both")
        require(self.trace is None or self.rate_search is None, "a trace has its own rate; leave rate_search out")
        require(
            self.rate_search is None or self.arrival.is_open,
            f"rate_search looks for a request rate, and arrival={self.arrival} has none; choose poisson or constant",
        )
        require(0 <= self.shared_prefix <= 1, f"shared_prefix={self.shared_prefix} must be in [0, 1]")
        require(self.osl.shortest >= 2, f"osl shortest={self.osl.shortest} must be at least 2 tokens: TPOT needs two")

    @property
    def longest_context(self) -> int:
        """Most tokens that one request can hold."""
        if self.trace is not None:
            return self.trace.longest_context
        if self.conversation is not None:
            return self.conversation.longest_context
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
