"""Operation tables: Parquet files of measured latencies, found by path, loaded when asked for, cached as plain arrays.

Layout: `<root>/data/<system>/<family>/<engine>/<version>/<table>.parquet` with one row per measurement. Among rows with
the same key the first wins. A directory of the same layout made elsewhere (`perf_model.collect`) serves as well.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from perf_model.numeric import BoolArray, FloatArray
from search_spaces.errors import InvalidValueError

CACHE_FORMAT = 2


def default_root() -> Path | None:
    """Where the optional package of public tables keeps them; None where it is not installed. Nothing is imported."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "systems"


def cache_directory() -> Path:
    """Where compact copies of tables are kept: `$TUNER_CACHE`, else `tuner` in the user's cache directory."""
    base = os.environ.get("TUNER_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tuner"


@dataclass(frozen=True)
class Table:
    """Columns of equal length; text columns are coded as positions in `words`."""

    columns: Mapping[str, NDArray[np.generic]]
    words: Mapping[str, tuple[str, ...]]
    origin: str = ""
    masks: dict[tuple[str, object], BoolArray] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def mask(self, column: str, value: object) -> BoolArray:
        """Rows whose `column` equals `value`; no row for an unknown word or column."""
        key = (column, value)
        if key not in self.masks:
            self.masks[key] = self._mask(column, value)
        return self.masks[key]

    def _mask(self, column: str, value: object) -> BoolArray:
        if column not in self.columns:
            return np.zeros(len(self), dtype=bool)
        if column in self.words:
            words = self.words[column]
            value = words.index(value) if value in words else -1
        return np.asarray(self.columns[column] == value)

    def where(self, **equal: object) -> Table:
        """The rows that match every `column=value`."""
        keep = np.ones(len(self), dtype=bool)
        for column, value in equal.items():
            keep &= self.mask(column, value)
        return self.take(np.flatnonzero(keep))

    def take(self, rows: NDArray[np.int64]) -> Table:
        """The given rows."""
        return Table({name: values[rows] for name, values in self.columns.items()}, self.words, self.origin)

    def number(self, column: str) -> FloatArray:
        """A numeric column."""
        return np.asarray(self.columns[column], dtype=np.float64)

    def values(self, column: str) -> set[str]:
        """Words that occur in a text column."""
        if column not in self.words:
            return set()
        return {self.words[column][code] for code in np.unique(self.columns[column]).astype(int)}


EMPTY = Table({}, {})


@dataclass(frozen=True)
class TableStore:
    """Tables of one system and engine below `root`.

    Each table comes from the engine's queryable version (`query_versions.yaml`, else the newest there is); where that
    version lacks the table, the nearest older one serves, then the nearest newer one.
    """

    root: Path
    system: str
    engine: str

    def table(self, family: str, name: str) -> Table:
        """The table, empty where no version has it."""
        key = (family, name)
        if key not in self._loaded:
            files = self.files(family, name)
            self._loaded[key] = load(files[0]) if files else EMPTY
        return self._loaded[key]

    def files(self, family: str, name: str) -> list[Path]:
        """The table's files, the one to use first."""
        base = self.root / "data" / self.system / family / ("nccl" if name == "nccl_perf" else self.engine)
        if not base.is_dir():
            return []
        found = [path for path in base.iterdir() if (path / f"{name}.parquet").is_file()]
        wanted = version_key(self.version)
        found.sort(key=lambda path: _distance(version_key(path.name), wanted))
        return [path / f"{name}.parquet" for path in found]

    @cached_property
    def version(self) -> str:
        """The engine version that the tables should have."""
        file = self.root / "query_versions.yaml"
        slots = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for entry in (slots.get("overrides", {}).get(self.system, {}), slots.get("defaults", {})):
            if self.engine in entry:
                return str(entry[self.engine]["current"])
        return "999"

    @cached_property
    def _loaded(self) -> dict[tuple[str, str], Table]:
        return {}


def version_key(text: str) -> tuple[int, ...]:
    """Sortable form of a version: numbers in order, a release candidate before its release."""
    parts = [int(part) for part in re.findall(r"\d+", text)]
    release = [*parts, 0, 0, 0][:3]
    candidate = len(parts) > 3 and "rc" in text
    return (*release, parts[3] - 1000 if candidate else 0, *parts[4 if candidate else 3 :])


def _distance(found: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    if found == wanted:
        return 0, ()
    return (1, tuple(-part for part in found)) if found < wanted else (2, found)


def load(path: Path) -> Table:
    """The table in `path`, through a cache of plain arrays keyed by path, size and time of change."""
    stat = path.stat()
    text = f"{CACHE_FORMAT}|{path}|{stat.st_size}|{stat.st_mtime_ns}"
    cached = cache_directory() / "tables" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    if cached.is_file():
        return _read_cache(cached, path)
    table = read_parquet(path)
    _write_cache(cached, table)
    return table


def read_parquet(path: Path) -> Table:
    """The table in `path`, dimension columns and latency; constant text that no query needs is left out."""
    from pyarrow import parquet

    frame = parquet.read_table(path)
    columns: dict[str, NDArray[np.generic]] = {}
    words: dict[str, tuple[str, ...]] = {}
    for name in frame.column_names:
        if name in {"framework", "version", "device", "model", "model_name"}:
            continue
        column = frame.column(name)
        if str(column.type) in {"string", "large_string"}:
            coded = column.combine_chunks().dictionary_encode()
            words[name] = tuple(str(word) for word in coded.dictionary.to_pylist())
            columns[name] = np.asarray(coded.indices.to_numpy(zero_copy_only=False), dtype=np.int32)
        else:
            columns[name] = column.to_numpy()
    if "latency" not in columns:
        raise InvalidValueError(f"{path} has no latency column; it has {', '.join(frame.column_names)}")
    return Table(columns, words, str(path))


def _write_cache(path: Path, table: Table) -> None:
    """Write the cache by an atomic rename; a directory that cannot be written leaves the table uncached."""
    content: dict[str, NDArray[np.generic]] = {f"c_{name}": values for name, values in table.columns.items()}
    content |= {f"w_{name}": np.asarray(words) for name, words in table.words.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    except OSError:
        return
    with os.fdopen(descriptor, "wb") as stream:
        np.savez(stream, **content)  # type: ignore[arg-type]  # numpy types its keyword arguments as bool
    Path(partial).replace(path)


def _read_cache(path: Path, origin: Path) -> Table:
    with np.load(path) as content:
        columns = {name[2:]: content[name] for name in content.files if name.startswith("c_")}
        words = {name[2:]: tuple(content[name].tolist()) for name in content.files if name.startswith("w_")}
    return Table(columns, words, str(origin))


def first_rows(table: Table, keys: Sequence[str]) -> Table:
    """The first row of each combination of `keys`, sorted by them."""
    columns = [table.columns[key] for key in keys]
    order = np.lexsort(columns[::-1])  # stable: the first of equal rows stays first
    new = np.ones(len(order), dtype=bool)
    if len(order):
        new[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    return table.take(order[new])
