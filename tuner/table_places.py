"""Where operation tables lie: the public ones that are installed, and the user's own, collected or imported.

The user's tables are in one directory of the common layout (`data/<system>/...` with `<system>.yaml` beside it): the
variable TUNER_TABLES, else `tuner/tables` in the user's data directory ($XDG_DATA_HOME, ~/.local/share). Each import
and each collection leaves a file in `provenance/` there. A family of tables that the user has for a system and engine
takes the place of the public one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perf_model.tables import cache_directory, default_root
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import DeviceKind, NodePool
from search_spaces.problem import Problem

if TYPE_CHECKING:
    from perf_model.silicon import Silicon
    from perf_model.step_tables import MeasuredNode

TABLES_VARIABLE = "TUNER_TABLES"
POOLS_FILE = "pools.json"
"""Which system the nodes of a CPU pool are, by labels: a study file does not say what processor they have."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The directory to read tables from, None for none; `own` are the systems whose tables the user has."""

    root: Path | None
    own: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What is used, for people."""
        if self.root is None:
            return "no operation tables (roofline alone); pip install 'tuner[silicon]' brings the public ones"
        if self.own:
            return f"operation tables of your own for {', '.join(self.own)} ({own_root()})"
        return "public operation tables"


def own_root() -> Path:
    """The directory of the user's own tables; it need not exist."""
    named = os.environ.get(TABLES_VARIABLE)
    if named:
        return Path(named).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "tuner" / "tables"


def systems_in(root: Path) -> tuple[str, ...]:
    """Systems that have tables below `root`."""
    data = root / "data"
    return tuple(sorted(path.name for path in data.iterdir() if path.is_dir())) if data.is_dir() else ()


def tables_of(problem: Problem) -> Tables:
    """The tables for the GPUs of `problem`: the installed ones with the user's own laid over them."""
    from perf_model.gpu_groups import system_name

    public, own = default_root(), own_root()
    wanted = {system_name(pool) for pool in problem.node_pools if pool.device.kind is DeviceKind.GPU}
    mine = tuple(name for name in systems_in(own) if name in wanted)
    if not mine:
        return Tables(root=public)
    return Tables(root=overlay(public, own) if public else own, own=mine)


def overlay(public: Path, own: Path) -> Path:
    """A directory of links to both; where `own` has a family for a system and engine, its versions alone count."""
    entries = _entries(public) | _entries(own)
    text = "\n".join(f"{place} {target}" for place, target in sorted(entries.items()))
    made = cache_directory() / "overlays" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if made.is_dir():
        return made
    partial = made.with_name(f"{made.name}.{os.getpid()}")
    for place, target in entries.items():
        link = partial / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    try:
        partial.rename(made)
    except OSError:  # another process has made it meanwhile
        shutil.rmtree(partial, ignore_errors=True)
    return made


def _entries(root: Path) -> dict[Path, Path]:
    """What lies below `root`: files at its top, and each folder of versions, by relative path."""
    found = [path for path in root.glob("*.yaml") if path.is_file()]
    found += [path for path in root.glob("data/*/*/*") if path.is_dir()]
    return {path.relative_to(root): path.resolve() for path in found}


def silicon_at(directory: Path | None) -> Silicon:
    """Replicas from the tables in `directory`, by default the installed ones with the user's own laid over them.

    Raises `InvalidValueError` where there are none, with the remedy.
    """
    from perf_model.silicon import Silicon

    roots = table_roots(directory)
    return Silicon(roots[0] if len(roots) == 1 else overlay(roots[0], roots[1]))


def table_roots(directory: Path | None) -> tuple[Path, ...]:
    """The directories of tables to look at: `directory`, else the installed public ones, then the user's own.

    Raises `InvalidValueError` where there are none, or where `directory` has another layout.
    """
    if directory is not None:
        return (checked_root(directory),)
    public, own = default_root(), own_root()
    found = tuple(root for root in (public, own) if root is not None and systems_in(root))
    if not found:
        raise InvalidValueError(
            "no operation tables are installed; bring the public ones with pip install 'tuner[silicon]', name a "
            f"directory of the same layout with --tables DIR, or import one to {own} with: tuner perf import DIR"
        )
    return found


def checked_root(directory: Path) -> Path:
    """`directory`, or its `systems` folder, where tables lie; raises `InvalidValueError` for another layout."""
    for root in (directory.expanduser(), directory.expanduser() / "systems"):
        if systems_in(root):
            return root.resolve()
    raise InvalidValueError(
        f"{directory} holds no operation tables; the layout is "
        "<dir>/data/<system>/<family>/<engine>/<version>/<table>.parquet, with <dir>/<system>.yaml beside it"
    )


def remember_pool(root: Path, pool: NodePool, system: str) -> None:
    """Note below `root` which system the nodes of `pool` are."""
    file = root / POOLS_FILE
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known | {_pool_key(pool): system}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _pool_key(pool: NodePool) -> str:
    """How Ray would find the pool; empty for any node."""
    words = sorted(f"{name}={value}" for name, value in pool.labels.items())
    return ",".join([*words, *([pool.accelerator_type] if pool.accelerator_type else [])])


def measured_nodes(problem: Problem, engine: str = "llamacpp") -> dict[str, MeasuredNode]:
    """What was collected of the CPU pools of `problem`, by pool.

    A pool with labels is the system that was collected under these; one without is this machine's processor, else what
    was collected without labels.
    """
    root = own_root()
    pools = [pool for pool in problem.node_pools if pool.device.kind is DeviceKind.CPU]
    if not pools or not systems_in(root):
        return {}
    from perf_model.step_tables import measured_node

    file = root / POOLS_FILE
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: dict[str, MeasuredNode] = {}
    for pool in pools:
        for system in _systems_of(pool, known):
            node = measured_node(root, system, engine)
            if node is not None:
                found[pool.name] = node
                break
    return found


def _systems_of(pool: NodePool, known: dict[str, str]) -> list[str]:
    from cluster.node_facts import cpu_model
    from tuner.collect_cores import system_of_cpu

    key = _pool_key(pool)
    here = [] if key else [system_of_cpu(cpu_model())]
    return here + ([known[key]] if key in known else [])


def own_notes(problem: Problem) -> list[str]:
    """What of the user's own tables is used for `problem`, in words; empty where nothing is."""
    notes = [
        f"pool {name}: predictions use the steps collected on {node.system} ({node.folder})"
        for name, node in measured_nodes(problem).items()
    ]
    tables = tables_of(problem)
    return [*notes, *([f"predictions use {tables.text}"] if tables.own else [])]
