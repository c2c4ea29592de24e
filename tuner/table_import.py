"""Importing a directory of operation tables: checked, copied, and with a note of where it came from."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from search_spaces.errors import InvalidValueError
from tuner.table_places import checked_root
from tuner.table_survey import TableCoverage, coverage


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was copied to `target`."""

    target: Path
    files: int
    rows: int
    systems: tuple[str, ...]
    provenance: Path


def import_tables(directory: Path, target: Path) -> Imported:
    """Copy the tables below `directory` to `target`; a file that is there already is replaced.

    Raises `InvalidValueError` for another layout, an unreadable table, one without latencies, or a system without its
    file of facts.
    """
    root, target = checked_root(directory), target.expanduser().resolve()
    if root == target:
        raise InvalidValueError(f"{directory} is where tables are imported to; name another directory, or --to DIR")
    found = coverage(root)
    _check(root, found)
    systems = tuple(sorted({row.system for row in found}))
    for row in found:
        _copy(row.file, target / row.file.relative_to(root))
    extras = [f"{system}.yaml" for system in systems] + ["query_versions.yaml"]
    for name in extras:
        if (root / name).is_file():
            _copy(root / name, target / name)
    note = write_provenance(
        target,
        "import",
        {"from": str(root), "systems": list(systems), "tables": len(found), "rows": sum(row.rows for row in found)},
    )
    return Imported(
        target=target, files=len(found), rows=sum(row.rows for row in found), systems=systems, provenance=note
    )


def _check(root: Path, found: list[TableCoverage]) -> None:
    from pyarrow import parquet

    if not found:
        raise InvalidValueError(
            f"{root} has no tables at data/<system>/<family>/<engine>/<version>/<table>.parquet; look at its layout"
        )
    for system in sorted({row.system for row in found}):
        if not (root / f"{system}.yaml").is_file():
            raise InvalidValueError(
                f"{root} has tables of {system}, but no {system}.yaml with its memory, bandwidth and FLOP/s; add it"
            )
    for row in found:
        columns = parquet.read_schema(row.file).names
        if "latency" not in columns:
            raise InvalidValueError(f"{row.file} has no column latency; it has {', '.join(columns)}")


def _copy(source: Path, place: Path) -> None:
    """Copy by a rename, so that a table is never seen half written."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.partial")
    shutil.copyfile(source, partial)
    partial.replace(place)


def write_provenance(target: Path, act: str, facts: dict[str, object]) -> Path:
    """Note in `target` what was put there, when, by whom and from where; returns the note's file."""
    now = datetime.now(UTC)
    note = target / "provenance" / f"{now:%Y%m%dT%H%M%S.%fZ}-{act}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    content = {"act": act, "time": now.isoformat(), "user": getpass.getuser(), "host": socket.gethostname()} | facts
    note.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return note
