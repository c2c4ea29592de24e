"""Operation tables: found by path and version, loaded once, cached, first of equal rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perf_model.systems import read_system
from perf_model.tables import TableStore, first_rows, load, read_parquet, version_key
from search_spaces.errors import InvalidValueError
from tests.perf_model.conftest import gemm_rows, write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


def test_the_current_version_is_used(tables: Path) -> None:
    store = TableStore(tables, "test_sxm", "vllm")
    assert "/1.0/" in store.table("gemm", "gemm_perf").origin


def test_an_older_version_serves_where_the_current_lacks_a_table(tables: Path) -> None:
    store = TableStore(tables, "test_sxm", "vllm")
    assert "/0.9/" in store.table("comm", "custom_allreduce_perf").origin


def test_a_missing_table_is_empty(tables: Path) -> None:
    assert len(TableStore(tables, "test_sxm", "vllm").table("moe", "moe_perf")) == 0
    assert len(TableStore(tables, "other", "vllm").table("gemm", "gemm_perf")) == 0


def test_the_cache_holds_what_the_file_holds(tables: Path, tmp_path: Path) -> None:
    file = tables / "data/test_sxm/gemm/vllm/1.0/gemm_perf.parquet"
    fresh, cached = load(file), load(file)
    plain = read_parquet(file)
    assert list((tmp_path / "cache").rglob("*.npz"))
    for table in (fresh, cached):
        assert table.words == plain.words
        assert all(np.array_equal(table.columns[name], plain.columns[name]) for name in plain.columns)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, "gemm/vllm/1.0/gemm_perf.parquet", gemm_rows())
    file = tmp_path / "data/test_sxm/gemm/vllm/1.0/gemm_perf.parquet"
    before = load(file).number("latency")[0]
    write(tmp_path, "gemm/vllm/1.0/gemm_perf.parquet", gemm_rows(factor=2.0)[:-1])
    assert load(file).number("latency")[0] == pytest.approx(2 * before)


def test_the_first_of_equal_rows_wins(tmp_path: Path) -> None:
    row = {"gemm_dtype": "bfloat16", "m": 1, "n": 2, "k": 3}
    write(tmp_path, "t.parquet", [row | {"latency": 7.0}, row | {"latency": 5.0}, row | {"m": 0, "latency": 1.0}])
    table = first_rows(read_parquet(tmp_path / "data/test_sxm/t.parquet"), ["m", "n"])
    assert table.number("m").tolist() == [0, 1]
    assert table.number("latency").tolist() == [1.0, 7.0]


def test_a_file_without_latency_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "t.parquet", [{"m": 1}])
    with pytest.raises(InvalidValueError, match="latency"):
        read_parquet(tmp_path / "data/test_sxm/t.parquet")


def test_unknown_words_match_no_row(tables: Path) -> None:
    table = TableStore(tables, "test_sxm", "vllm").table("gemm", "gemm_perf")
    assert len(table.where(gemm_dtype="fp8")) == 0
    assert len(table.where(nothing=1)) == 0


def test_versions_sort_as_people_expect() -> None:
    texts = ["0.5.9", "0.5.14", "1.3.0rc10", "1.3.0rc20", "1.3.0"]
    assert sorted(texts, key=version_key) == texts


def test_a_system_is_read_and_an_unknown_one_named(tables: Path) -> None:
    system = read_system(tables, "test_sxm")
    assert system.peak("fp8") == 2e14
    assert system.peak("fp4") == 2e14  # half the width is what the GPU has
    assert system.memory_ms(8e8) == pytest.approx(1e3 * (8e8 / 0.8e12 + 3e-6))
    with pytest.raises(InvalidValueError, match="test_sxm"):
        read_system(tables, "h900")
