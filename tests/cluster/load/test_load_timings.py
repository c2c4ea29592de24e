"""Raw timings survive their file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.load.timings import ErrorClass, Phase, Timings, read_timings, write_timings
from search_spaces.errors import InvalidValueError
from tests.support.load_timings import timing


def test_timings_survive_their_file(tmp_path: Path) -> None:
    timings = Timings(
        start_epoch_ns=1_800_000_000_123_456_789,
        start_monotonic_ns=987_654_321_987,
        requests=(
            timing(0.5, [1, 2.5, 3], phase=Phase.WARM_UP),
            timing(4, [], index=1, error=ErrorClass.CONNECT),
            timing(5, [6, 7], index=2, phase=Phase.AFTER, error=ErrorClass.ABANDONED, planned_tokens=9),
        ),
    )
    path = tmp_path / "new" / "timings.parquet"
    write_timings(timings, path)
    assert read_timings(path) == timings
    assert [t.index for t in read_timings(path).of_phase(Phase.AFTER)] == [2]


def test_a_run_without_requests_has_a_file_too(tmp_path: Path) -> None:
    empty = Timings(start_epoch_ns=1, start_monotonic_ns=2, requests=())
    write_timings(empty, tmp_path / "t.parquet")
    assert read_timings(tmp_path / "t.parquet") == empty


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(InvalidValueError, match="version None; this version reads b'1'"):
        read_timings(tmp_path / "t.parquet")
