"""What happened to each request of a run, in nanoseconds, and how it is kept as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from search_spaces.errors import InvalidValueError


class Phase(StrEnum):
    """Part of the run to which a request belongs. Only `measured` ones make latencies; the others keep up the load."""

    WARM_UP = "warm_up"
    MEASURED = "measured"
    AFTER = "after"


class ErrorClass(StrEnum):
    """How a request failed."""

    CONNECT = "connect"  # no connection was made
    STATUS = "status"  # the answer's status was not 200
    STREAM = "stream"  # the stream broke off, was no event stream, or held an error
    SHORT = "short"  # fewer tokens than asked for
    TIMEOUT = "timeout"  # no end within the request's time limit
    ABANDONED = "abandoned"  # in flight when the run ended: not the server's fault, and no error


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """One request. Times are integer nanoseconds since the run's start.

    `scheduled_ns` is when it was due: by the arrival schedule, or when its slot of the closed loop became free.
    `sent_ns` is when the client began to send it, connecting included where no open connection was free
    (`connect_ns` long). `token_ns` is the arrival of each event that carries tokens (most engines send one token an
    event). `planned_tokens` were asked for; `output_tokens` is the server's count, or the number of events where the
    server gives none. `resent` tells that an idle connection had been closed by the server and the request went out
    again on a new one; its clock was not restarted.
    """

    index: int
    phase: Phase
    scheduled_ns: int
    sent_ns: int
    connect_ns: int
    token_ns: tuple[int, ...]
    end_ns: int
    input_tokens: int
    planned_tokens: int
    output_tokens: int
    resent: bool = False
    error: ErrorClass | None = None
    error_text: str = ""

    @property
    def completed(self) -> bool:
        """True where every token asked for has arrived."""
        return self.error is None

    @property
    def failed(self) -> bool:
        """True where the request ended badly (being abandoned at the end of the run is no failure)."""
        return self.error is not None and self.error is not ErrorClass.ABANDONED

    @property
    def lateness_ns(self) -> int:
        """How long after it was due the client began to send it."""
        return self.sent_ns - self.scheduled_ns


@dataclass(frozen=True, kw_only=True)
class Timings:
    """All requests of a run in send order. The two starts are the same moment on the wall and the monotonic clock."""

    start_epoch_ns: int
    start_monotonic_ns: int
    requests: tuple[RequestTiming, ...]

    def of_phase(self, phase: Phase) -> list[RequestTiming]:
        """The requests of one phase, in send order."""
        return [request for request in self.requests if request.phase is phase]


_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("phase", pa.string()),
        ("scheduled_ns", pa.int64()),
        ("sent_ns", pa.int64()),
        ("connect_ns", pa.int64()),
        ("token_ns", pa.list_(pa.int64())),
        ("end_ns", pa.int64()),
        ("input_tokens", pa.int64()),
        ("planned_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("resent", pa.bool_()),
        ("error", pa.string()),
        ("error_text", pa.string()),
    ]
)
_VERSION = b"1"


def write_timings(timings: Timings, path: Path) -> None:
    """Write `timings` as Parquet: a row for each request, the starts in the schema's metadata."""
    metadata = {
        b"tuner.timings": _VERSION,
        b"start_epoch_ns": str(timings.start_epoch_ns).encode(),
        b"start_monotonic_ns": str(timings.start_monotonic_ns).encode(),
    }
    columns = {name: [getattr(request, name) for request in timings.requests] for name in _SCHEMA.names}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=_SCHEMA.with_metadata(metadata)), path, compression="zstd")


def read_timings(path: Path) -> Timings:
    """Read what `write_timings` wrote; raises `InvalidValueError` for a file of another kind or version."""
    table = pq.read_table(path)
    metadata: dict[bytes, bytes] = table.schema.metadata or {}
    found = metadata.get(b"tuner.timings")
    if found != _VERSION:
        raise InvalidValueError(f"{path} holds request timings of version {found!r}; this version reads {_VERSION!r}")
    return Timings(
        start_epoch_ns=int(metadata[b"start_epoch_ns"]),
        start_monotonic_ns=int(metadata[b"start_monotonic_ns"]),
        requests=tuple(_request(row) for row in _rows(table)),
    )


def _rows(table: pa.Table) -> Sequence[dict[str, object]]:
    rows: list[dict[str, object]] = table.to_pylist()
    return rows


def _request(row: dict[str, object]) -> RequestTiming:
    values = dict(row)
    values["phase"] = Phase(str(row["phase"]))
    values["error"] = None if row["error"] is None else ErrorClass(str(row["error"]))
    values["token_ns"] = tuple(row["token_ns"])  # type: ignore[arg-type]  # a list column of the schema above
    return RequestTiming(**values)  # type: ignore[arg-type]  # the schema above fixes names and types
