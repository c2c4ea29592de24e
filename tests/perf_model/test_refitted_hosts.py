"""Host constants of the search benchmark, fitted without an architecture's runs (`benchmarks/search/hosts.py`)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.search.hosts import neutral_hosts, refitted_hosts
from perf_model.layout import ReplicaLayout
from perf_model.precision import Precision
from perf_model.prior import model_word
from perf_model.runs import Run, RunPool
from perf_model.silicon import Silicon
from perf_model.validate import predict_runs
from search_spaces.known_models import known_model
from search_spaces.serving import Mode


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


def make_run(name: str, tp: int, users: float) -> Run:
    return Run(
        id=f"{name} {tp} {users}",
        model=known_model(name),
        model_name=name,
        system="test_sxm",
        engine="vllm",
        engine_version="",
        precision=Precision(),
        mode=Mode.AGGREGATED,
        isl=1024.0,
        osl=256.0,
        concurrency=users,
        stream_tokens=1.0,
        admission_steps=0.0,
        ttft_ms=1.0,
        tpot_ms=1.0,
        pools=(RunPool(layout=ReplicaLayout(tp=tp)),),
    )


def measured(runs: list[Run], tables: Path, decode_factor: float) -> list[Run]:
    """`runs` as an engine answers whose kernels take `decode_factor` times as long."""
    neutral = neutral_hosts()
    hosts = {**neutral, "vllm": replace(neutral["vllm"], decode_factor=decode_factor)}
    predicted, _ = predict_runs(runs, Silicon(tables).with_hosts(hosts))
    return [replace(one.run, ttft_ms=one.ttft_ms, tpot_ms=one.tpot_ms) for one in predicted]


@pytest.mark.long
def test_constants_are_those_of_the_other_architectures_and_are_kept(tables: Path, tmp_path: Path) -> None:
    loads = list(itertools.product((1, 2), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)))
    seen, unseen = (
        measured([make_run(name, tp, users) for name in names for tp, users in loads], tables, factor)
        for names, factor in ((("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B"), 1.3), (("Qwen/Qwen3-32B",), 3.0))
    )
    word = model_word(known_model("Qwen/Qwen3-32B"))
    both = refitted_hosts([*seen, *unseen], [word, "no such model"], tables=tables, cache=tmp_path / "kept")
    assert 1.2 < both[word]["vllm"].decode_factor < 1.35, "the left-out architecture's factor is 3"
    assert both["no such model"]["vllm"].decode_factor > both[word]["vllm"].decode_factor
    assert both[word]["sglang"] == neutral_hosts()["sglang"], "no run, no fit"
    assert len(list((tmp_path / "kept").glob("hosts_vllm_*.json"))) == 2
    assert refitted_hosts([*seen, *unseen], [word], tables=tables, cache=tmp_path / "kept")[word] == both[word]
    alone = refitted_hosts(seen, [word], tables=tables, cache=None)
    assert alone[word]["vllm"].decode_factor == pytest.approx(both[word]["vllm"].decode_factor)
