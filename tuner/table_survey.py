"""What a directory of operation tables holds: rows by table, and the ranges of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces.errors import InvalidValueError

if TYPE_CHECKING:
    from rich.console import Console

_NO_RANGE = {"framework", "version", "device", "op_name", "latency", "energy", "power", "kernel_source", "model"}
RANGES_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class TableCoverage:
    """One table: where it lies, how many rows, the least and most of each numeric column, the words of the others."""

    root: Path
    system: str
    family: str
    engine: str
    version: str
    table: str
    rows: int
    ranges: dict[str, tuple[float, float]]
    words: dict[str, tuple[str, ...]]

    @property
    def file(self) -> Path:
        """The table's file."""
        folder = self.root / "data" / self.system / self.family / self.engine / self.version
        return folder / f"{self.table}.parquet"


def coverage(root: Path, system: str | None = None, engine: str | None = None) -> list[TableCoverage]:
    """Every table below `root`, of one `system` or `engine` where given; read from the files' statistics.

    Raises `InvalidValueError` with the names there are for a system or engine without tables.
    """
    files = sorted((root / "data").glob("*/*/*/*/*.parquet"))
    for position, (label, name) in enumerate((("system", system), ("engine", engine))):
        names = sorted({file.parts[-5 if position == 0 else -3] for file in files})
        if name is not None and name not in names:
            raise InvalidValueError(f"{label} {name!r} has no tables in {root}; there are {', '.join(names)}")
    return [
        _read(root, file) for file in files if system in {None, file.parts[-5]} and engine in {None, file.parts[-3]}
    ]


def _read(root: Path, file: Path) -> TableCoverage:
    from pyarrow import ArrowInvalid, parquet

    try:
        found = parquet.ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise InvalidValueError(f"{file} is no Parquet file ({error}); delete it, or import the tables anew") from error
    ranges: dict[str, tuple[float, float]] = {}
    words: dict[str, set[str]] = {}
    for group in range(found.metadata.num_row_groups):
        row_group = found.metadata.row_group(group)
        for column in range(row_group.num_columns):
            chunk = row_group.column(column)
            statistics = chunk.statistics
            if chunk.path_in_schema in _NO_RANGE or statistics is None or not statistics.has_min_max:
                continue
            _widen(chunk.path_in_schema, statistics.min, statistics.max, ranges, words)
    *_, system, family, engine, version, name = file.parts
    return TableCoverage(
        root=root,
        system=system,
        family=family,
        engine=engine,
        version=version,
        table=name.removesuffix(".parquet"),
        rows=found.metadata.num_rows,
        ranges=ranges,
        words={column: tuple(sorted(values)) for column, values in words.items()},
    )


def _widen(
    name: str, low: object, high: object, ranges: dict[str, tuple[float, float]], words: dict[str, set[str]]
) -> None:
    """Take the least and most of one part of a column into its range, or into its words."""
    if isinstance(low, int | float) and isinstance(high, int | float):
        before = ranges.get(name, (float(low), float(high)))
        ranges[name] = (min(before[0], float(low)), max(before[1], float(high)))
    else:
        words.setdefault(name, set()).update((str(low), str(high)))


def show_coverage(found: Sequence[TableCoverage], roots: Sequence[Path], console: Console) -> None:
    """Print a line for each table."""
    total = sum(row.rows for row in found)
    console.print(f"{len(found)} tables, {total:,} rows, in {', '.join(map(str, roots))}", soft_wrap=True)
    for row in found:
        place = f"{row.system} / {row.family} / {row.engine} {row.version} / {row.table}"
        console.print(f"{place}: {row.rows:,} rows", soft_wrap=True)
        if row.ranges:
            console.print(f"    {_ranges(row)}", soft_wrap=True)


def _ranges(row: TableCoverage) -> str:
    """The widest ranges."""
    widest = sorted(row.ranges.items(), key=lambda item: -(item[1][1] / max(item[1][0], 1.0)))
    varied = [(name, low, high) for name, (low, high) in widest if high > low]
    return ", ".join(f"{name} {low:g}..{high:g}" for name, low, high in varied[:RANGES_SHOWN])


def coverage_json(found: Sequence[TableCoverage]) -> list[dict[str, object]]:
    """The tables as plain JSON."""
    return [asdict(row) | {"root": str(row.root)} for row in found]
