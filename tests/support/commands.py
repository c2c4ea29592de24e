"""Commands called in this process, on trials that are measured in memory."""

from __future__ import annotations

import logging
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import tuner.wiring
from search_spaces.problem import Problem
from tests.support.memory_runner import MemoryRunner
from tuner.access import Connect
from tuner.cli import main
from tuner.places import Place
from tuner.wiring import UNMEASURED_CORE

TEXT = """
name: toy
workload: {isl: 64, osl: 16, concurrency: [1, 2, 4]}
objectives: [output_tokens_per_s, ttft_p50_ms]
slos: {ttft_p99_ms: 60}
node_pools: {local: {cpus_per_node: 4, price_per_hour: 1.0}}
engines: {llamacpp: {threads: [1, 2], max_num_seqs: [1, 4], batch_size: 512, ubatch_size: 512, flash_attention: true,
  kv_cache_dtype: f16}}
budget: {trials: 5, confirm: 1}
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Invoke:
    """Calls the entry point as a shell would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *args: str) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["tuner", *args])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        out, err = self._capsys.readouterr()
        return Done(code if isinstance(code, int) else int(code is not None), out, err)


class NoCluster:
    """A cluster in memory."""

    trials_at_once = 1

    def measure(self, _pool: object) -> object:
        return UNMEASURED_CORE

    def runner(self, _study: str) -> MemoryRunner:
        return MemoryRunner(polls=0)


def connector(_address: str | None, _engines: object, _avoid: object = ()) -> Connect:
    @contextmanager
    def connect(_problem: Problem, _place: Place) -> Iterator[NoCluster]:
        logging.getLogger("cluster.ray_session").warning("cores are %s", "shared")
        yield NoCluster()

    return connect  # type: ignore[return-value]  # a cluster by its behaviour


def commands_in(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Commands in `folder`, which holds `study.yaml`, with trials that are measured in memory."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tuner.wiring, "connector", connector)
    (folder / "study.yaml").write_text(TEXT)
    return Invoke(monkeypatch, capsys)


def stored_rows(database: Path = Path("tuner-data/studies.db")) -> list[str]:
    """Every row of every table, as SQL.

    A database's bytes say less: whoever closes a connection last moves what its log holds into the file.
    """
    with closing(sqlite3.connect(database)) as connection:
        return list(connection.iterdump())
