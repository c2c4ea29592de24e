"""Collecting tables on this machine: written in the layout that is read, resumed, used."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from perf_model.collect import (
    AttentionShape,
    Collection,
    GemmShape,
    NumpyBench,
    attention_shapes,
    collect,
    gemm_shapes,
    measure,
    write_system,
)
from perf_model.costs import OperationCosts
from perf_model.curves import Origin
from perf_model.microbench import measure_figures
from perf_model.operations import Gemm
from perf_model.systems import read_system
from perf_model.tables import TableStore
from search_spaces.errors import InvalidValueError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


class CountingBench(NumpyBench):
    """Counts the kernels that it is asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def gemm(self, shape: GemmShape) -> Callable[[], object]:
        self.asked += 1
        return super().gemm(shape)


def target(tmp_path: Path) -> Collection:
    return Collection(root=tmp_path / "systems", system="this_cpu", engine="vllm", version="1.0")


SHAPES = gemm_shapes([64, 128], [1, 16])


def test_collected_tables_are_found_and_used(tmp_path: Path) -> None:
    last = list(collect(NumpyBench(), target(tmp_path), "gemm", SHAPES, seconds=0.001))[-1]
    assert (last.done, last.total, last.found) == (8, 8, 0)
    write_system(target(tmp_path), measure_figures(seconds=0.01, megabytes=4), devices_per_node=4)
    root = tmp_path / "systems"
    costs = OperationCosts(TableStore(root, "this_cpu", "vllm"), read_system(root, "this_cpu"))
    curve = costs.token_curve(Gemm(name="g", n=128, k=64, count=1, format="bfloat16"))
    assert curve.origin_at(16) is Origin.EXACT
    assert 0 < curve(np.array([16.0]))[0] < 1000


def test_a_collection_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    list(collect(NumpyBench(), target(tmp_path), "gemm", SHAPES[:5], seconds=0.001))
    bench = CountingBench()
    last = list(collect(bench, target(tmp_path), "gemm", SHAPES, seconds=0.001))[-1]
    assert bench.asked == 3
    assert (last.done, last.total, last.found) == (8, 8, 5)
    assert list(collect(CountingBench(), target(tmp_path), "gemm", SHAPES)) == []


@pytest.mark.parametrize("decode", [True, False])
def test_attention_is_collected(tmp_path: Path, *, decode: bool) -> None:
    shapes = attention_shapes([(4, 2, 32)], [1, 2], [16, 64], decode=decode)
    list(collect(NumpyBench(), target(tmp_path), "decode" if decode else "prefill", shapes, seconds=0.001))
    name = f"{'generation' if decode else 'context'}_attention_perf"
    table = TableStore(tmp_path / "systems", "this_cpu", "vllm").table("attention", name)
    assert len(table) == 4
    assert set(table.number("isl") + table.number("step")) == {16.0, 64.0}


class SleepingBench(NumpyBench):
    """Kernels that take m milliseconds at least."""

    def gemm(self, shape: GemmShape) -> Callable[[], object]:
        return lambda: time.sleep(shape.m / 1e3)


@pytest.mark.parametrize("milliseconds", [1, 8])
def test_a_kernel_takes_what_it_takes(milliseconds: int) -> None:
    shape = GemmShape(gemm_dtype="bfloat16", m=milliseconds, n=1, k=1)
    assert milliseconds <= measure(SleepingBench(), shape, 0.01) < 100 * milliseconds


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="fp8"):
        NumpyBench().gemm(GemmShape(gemm_dtype="fp8", m=1, n=1, k=1))
    with pytest.raises(InvalidValueError, match="gemm, prefill, decode"):
        next(collect(NumpyBench(), target(tmp_path), "magic", []))


def test_attention_weighs_values_by_their_keys() -> None:
    shape = AttentionShape(batch_size=2, isl=3, step=0, num_heads=4, num_key_value_heads=2, head_dim=8)
    out = NumpyBench().attention(shape)()
    assert isinstance(out, np.ndarray)
    assert out.shape == (2, 2, 6, 8)
    assert np.all((out > 0) & (out < 1))
