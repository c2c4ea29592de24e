"""A table that is being collected: rows are added in parts, and what is there already is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

Row = Mapping[str, str | float | int]
NOT_IN_KEY = frozenset({"latency", "spread", "repeats", "kernel_source"})


@dataclass(frozen=True)
class CollectedTable:
    """The Parquet file at `path`; a row is known by all its columns but latency, spread, repeats and source."""

    path: Path

    def rows(self) -> list[Row]:
        """What is there."""
        if not self.path.is_file():
            return []
        from pyarrow import parquet

        return [dict(row) for row in parquet.read_table(self.path).to_pylist()]

    def known(self) -> set[tuple[tuple[str, object], ...]]:
        """Keys of the rows that are there."""
        return {key_of(row) for row in self.rows()}

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows by a rename of the whole file: an interrupted collection leaves what was there."""
        import pyarrow as pa
        from pyarrow import parquet

        content = [*self.rows(), *rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in content]), partial)
        partial.replace(self.path)


def key_of(row: Row) -> tuple[tuple[str, object], ...]:
    """What tells a row from others; numbers count by value."""
    return tuple(
        sorted(
            (name, float(v) if isinstance(v, int | float) else v) for name, v in row.items() if name not in NOT_IN_KEY
        )
    )
