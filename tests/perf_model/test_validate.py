"""Measured runs: read, cleaned, predicted or counted with a reason."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from perf_model.layout import ReplicaLayout
from perf_model.runs import Run, Unpredictable, read_runs, run_layout, run_model
from perf_model.silicon import Silicon
from perf_model.validate import validate, write_predictions
from search_spaces.errors import InvalidValueError
from search_spaces.known_models import DIRECTORY

COLUMNS = [
    "id",
    "model",
    "system",
    "engine",
    "engine_version",
    "precision",
    "mode",
    "isl",
    "osl",
    "concurrency",
    "ttft_ms",
    "tpot_ms",
    "gemm_quant_mode",
    "batch_size",
    "tp_size",
    "pp_size",
    "attention_dp_size",
    "moe_tp_size",
    "moe_ep_size",
    "prefill_num_workers",
    "prefill_tp_size",
    "decode_num_workers",
    "decode_tp_size",
]
BASE = {
    "id": "a",
    "model": "Qwen/Qwen3-8B",
    "system": "test_sxm",
    "engine": "vllm",
    "precision": "bf16",
    "mode": "agg",
    "isl": "1024",
    "osl": "128",
    "concurrency": "8",
    "ttft_ms": "300",
    "tpot_ms": "20",
    "tp_size": "1",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


def written(tmp_path: Path, *rows: dict[str, str]) -> Path:
    path = tmp_path / "runs.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(BASE | row for row in rows)
    return path


def test_every_row_is_predicted_or_counted_with_a_reason(tables: Path, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"id": "good"},
        {"id": "pair", "mode": "disagg", "prefill_num_workers": "1", "decode_num_workers": "2"},
        {"id": "nobody", "model": "acme/Unheard-Of-1T"},
        {"id": "empty", "concurrency": ""},
        {"id": "odd", "tp_size": "3"},
        {"id": "large", "model": "meta-llama/Llama-3.1-405B"},
        {"id": "workers", "mode": "disagg", "ttft_ms": "301"},
    )
    found = validate(path, Silicon(tables))
    assert found.rows == 7
    assert [name for name, _, _ in found.predictions] == ["good", "pair"]
    assert found.coverage == {"aggregated": pytest.approx(1 / 5), "disaggregated": pytest.approx(1 / 2)}
    assert sum(found.reasons.values()) == 5
    text = " ".join(found.reasons)
    for words in ("Unheard-Of", "concurrency", "tp=3", "does not fit", "prefill_num_workers"):
        assert words in text
    assert {summary.group for summary in found.summaries["engine"]} == {"vllm"}


def test_predictions_are_written_with_their_ids(tables: Path, tmp_path: Path) -> None:
    found = validate(written(tmp_path, {"id": "x"}, {"id": "y", "concurrency": "64"}), Silicon(tables))
    write_predictions(found, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == ["x", "y"]
    assert float(rows[1]["ttft_ms"]) > float(rows[0]["ttft_ms"]) > 0


def test_a_correction_is_applied(tables: Path, tmp_path: Path) -> None:
    path = written(tmp_path, {})
    plain = validate(path, Silicon(tables)).predictions[0]
    double = validate(path, Silicon(tables), correct=lambda rows: [(2 * r.ttft_ms, r.tpot_ms) for r in rows])
    assert double.predictions[0][1] == pytest.approx(2 * plain[1])


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({"tp_size": "4", "moe_tp_size": "4", "moe_ep_size": "1"}, ReplicaLayout(tp=4)),
        ({"tp_size": "8", "moe_tp_size": "1", "moe_ep_size": "8"}, ReplicaLayout(tp=8, ep=8)),
        # products in place of sizes
        ({"tp_size": "64", "moe_tp_size": "8", "moe_ep_size": "8"}, ReplicaLayout(tp=8, ep=8)),
        ({"attention_dp_size": "16", "moe_tp_size": "4", "moe_ep_size": "4"}, ReplicaLayout(dp=4, ep=4)),
        ({"tp_size": "4", "attention_dp_size": "4", "moe_ep_size": "16"}, ReplicaLayout(tp=4, ep=4)),
        ({"attention_dp_size": "0"}, ReplicaLayout()),
    ],
)
def test_layouts_behind_the_sizes_of_a_row(sizes: dict[str, str], layout: ReplicaLayout) -> None:
    assert run_layout(sizes, "") == layout


def test_batch_size_stands_in_for_concurrency(tmp_path: Path) -> None:
    runs = read_runs(written(tmp_path, {"concurrency": "", "batch_size": "16", "attention_dp_size": "2"}))
    assert isinstance(runs[0], Run)
    assert runs[0].concurrency == 32


def test_replicas_of_a_run_are_read_from_the_requests_of_a_rank(tables: Path, tmp_path: Path) -> None:
    """`batch_size` counts the requests of a rank: 64 in flight at 8 each are 8 replicas, each with 8 users."""
    path = written(tmp_path, {"id": "one", "concurrency": "8"}, {"id": "eight", "concurrency": "64", "batch_size": "8"})
    one, eight = validate(path, Silicon(tables)).predictions
    assert eight[1:] == pytest.approx(one[1:])
    runs = read_runs(written(tmp_path, {"concurrency": "64", "batch_size": "16", "attention_dp_size": "4"}))
    assert isinstance(runs[0], Run)
    assert (runs[0].pools[0].replicas, runs[0].rank_users) == (1, 16)


def test_a_run_that_is_listed_twice_is_known_by_the_complete_row(tmp_path: Path) -> None:
    pair = {"mode": "disagg", "tp_size": "", "prefill_tp_size": "1", "decode_tp_size": "2"}
    workers = {"prefill_num_workers": "3", "decode_num_workers": "4"}
    whole, twin, other = read_runs(
        written(
            tmp_path,
            pair | workers,
            pair | {"id": "b", "decode_tp_size": "8", "ttft_ms": "300.0001"},
            pair | {"id": "c", "ttft_ms": "301"},
        )
    )
    assert isinstance(whole, Run)
    assert isinstance(twin, Run)
    assert twin.pools == whole.pools
    assert [pool.replicas for pool in twin.pools] == [3, 4]
    assert isinstance(other, Unpredictable)


def test_models_may_come_from_configs_beside_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = tmp_path / "core" / "model_configs"
    configs.mkdir(parents=True)
    catalogue = json.loads((DIRECTORY / "Qwen3-8B.json").read_text(encoding="utf-8"))
    (configs / "acme--Small-1B_config.json").write_text(
        json.dumps(catalogue | {"num_hidden_layers": 5}), encoding="utf-8"
    )
    monkeypatch.setattr("perf_model.runs.default_root", lambda: tmp_path / "core" / "systems")
    assert run_model("acme/Small-1B").num_layers == 5
    with pytest.raises(InvalidValueError, match="Small-2B"):
        run_model("acme/Small-2B")


def test_totals_of_several_pools_are_no_replica(tmp_path: Path) -> None:
    (refused,) = read_runs(written(tmp_path, {"tp_size": "64", "moe_tp_size": "64", "moe_ep_size": "1"}))
    assert isinstance(refused, Unpredictable)
    assert "tp=64" in refused.reason
    (product,) = read_runs(written(tmp_path, {"tp_size": "64", "moe_tp_size": "8", "moe_ep_size": "8"}))
    assert isinstance(product, Run)


def test_recipes_that_draft_tokens_are_known_by_their_image(tmp_path: Path) -> None:
    row = {"engine": "trtllm", "engine_version": "1.2.0rc6.post3"}
    drafting, parallel, plain = read_runs(
        written(tmp_path, row, row | {"attention_dp_size": "2"}, {"engine": "trtllm", "engine_version": "1.2.0rc6"})
    )
    found = [run.speculation.drafted for run in (drafting, parallel, plain) if isinstance(run, Run)]
    assert found == [3.0, 1.0, 0.0]


def test_unknown_precisions_are_told(tmp_path: Path) -> None:
    runs = read_runs(written(tmp_path, {"precision": "fp3"}))
    assert isinstance(runs[0], Unpredictable)
    assert "fp3" in runs[0].reason


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="no file"):
        read_runs(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("id,model\n", encoding="utf-8")
    with pytest.raises(InvalidValueError, match="tpot_ms"):
        read_runs(tmp_path / "bad.csv")
