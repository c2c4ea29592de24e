"""What the router remembers of each request, and the figures over them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

import numpy as np

KEPT = 20_000
"""Records kept; older ones are dropped."""
PERCENTILES = (50, 90, 95, 99)


class Ending(StrEnum):
    """How a request ended: answered in full, failed, or given up by its client."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(kw_only=True)
class Record:
    """One request, filled in as it goes on; None stands for a phase that it did not reach or does not have.

    `started_ns` is the Unix time of its arrival. Times are as the router sees them (HTTP included), those with
    `engine` in their name as the engine does. `decode_prompt_n` and `decode_cache_n` are the prompt tokens that the
    decode replica computed and found in its cache: at most 1 and the rest, where the hand-over worked.
    """

    started_ns: int
    ending: Ending | None = None
    error: str | None = None
    replica: str | None = None
    prefill_replica: str | None = None
    prompt_tokens: int | None = None
    prefill_queue_ms: float | None = None
    prefill_ms: float | None = None
    prefill_engine_ms: float | None = None
    save_ms: float | None = None
    save_engine_ms: float | None = None
    kv_bytes: int | None = None
    decode_queue_ms: float | None = None
    restore_ms: float | None = None
    restore_engine_ms: float | None = None
    hand_over_ms: float | None = None
    first_chunk_ms: float | None = None
    decode_engine_ms: float | None = None
    decode_prompt_n: int | None = None
    decode_cache_n: int | None = None
    total_ms: float | None = None


_FIGURES = tuple(f.name for f in fields(Record) if f.name.endswith(("_ms", "_bytes", "_n", "_tokens")))


class Records:
    """The last requests and how many ended in which way since the router started."""

    def __init__(self) -> None:
        self._kept: deque[Record] = deque(maxlen=KEPT)
        self.endings: Counter[Ending] = Counter()

    def add(self, record: Record, ending: Ending, error: str | None = None) -> None:
        """Keep `record`, which ended in `ending`."""
        record.ending, record.error = ending, error
        self.endings[ending] += 1
        self._kept.append(record)

    def since(self, started_ns: int) -> list[Record]:
        """Kept records of requests that arrived at or after `started_ns`, in the order in which they ended."""
        return [record for record in self._kept if record.started_ns >= started_ns]


def summary(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Count, mean, maximum and percentiles of every figure over the completed ones of `records`."""
    completed = [asdict(record) for record in records if record.ending is Ending.COMPLETED]
    columns = {name: [row[name] for row in completed if row[name] is not None] for name in _FIGURES}
    return {name: _figures(values) for name, values in columns.items() if values}


def _figures(values: list[float]) -> dict[str, float]:
    percentiles = np.percentile(values, PERCENTILES)
    return {
        "count": len(values),
        "mean": float(np.mean(values)),
        "max": float(np.max(values)),
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
    }
