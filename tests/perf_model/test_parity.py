"""Raw step latencies against the reference's engine on the same tables (see `benchmarks/parity.py` for all models)."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from benchmarks.parity import ENGINES, compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("aiconfigurator_core") is None, reason="the extra [silicon] is not installed"
    ),
]


@pytest.mark.parametrize("model", ["Llama-3.1-70B", pytest.param("MiniMax-M2.5", marks=pytest.mark.long)])
def test_steps_agree_with_the_reference(model: str) -> None:
    differences = compare(2, names=(model,), systems=("h200_sxm",))
    assert {engine for _, engine, _ in differences} == set(ENGINES)
    assert {kind for _, _, kind in differences} == {"prefill", "decode", "mixed"}
    for group, values in differences.items():
        assert np.median(np.abs(values)) < 0.03, group
        assert np.quantile(np.abs(values), 0.95) < 0.10, group
