"""`tuner perf validate`, `show` and `import`, and where predictions find tables."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import tuner.table_places
from perf_model.tables import TableStore, default_root
from search_spaces.errors import InvalidValueError
from tuner.cli import main
from tuner.prediction import look_out
from tuner.study_file import parse_study
from tuner.table_import import import_tables
from tuner.table_places import overlay, own_root, silicon_at, table_roots, tables_of
from tuner.table_survey import coverage
from tuner.wiring import make_problem

MEASURED = Path(__file__).parents[3] / "shared" / "silicon" / "measured_serving.csv"
SYSTEM = {
    "gpu": {"mem_bw": 1e12, "mem_capacity": 80e9, "bfloat16_tc_flops": 1e14},
    "node": {"num_gpus_per_node": 8, "inter_node_bw": 5e10, "intra_node_bw": 4e11},
}
GPU = """
name: gpu
model: {name: Llama-3.1-8B}
workload: {isl: 512, osl: 64, concurrency: 16}
objectives: [output_tokens_per_s_per_gpu, ttft_p50_ms]
node_pools: {h100: {device: h100_sxm, gpus_per_node: 1}}
engines: {vllm: {}}
calibration: none
"""


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_TABLES", str(tmp_path / "own"))
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tuner", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def gemm_rows(factor: float) -> list[dict[str, object]]:
    """Products at a share of the speed of light that `factor` divides."""
    return [
        {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": factor * (2e3 * m * n * k / 1e14 + 0.01)}
        for m, n, k in product((1, 64, 4096), (512, 4096, 14336), (512, 4096, 14336))
    ]


def make_tables(root: Path, system: str = "h100_sxm", *, factor: float = 1.0, engine: str = "vllm") -> Path:
    file = root / "data" / system / "gemm" / engine / "9.9" / "gemm_perf.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(gemm_rows(factor)), file)
    (root / f"{system}.yaml").write_text(yaml.safe_dump(SYSTEM), encoding="utf-8")
    return root


def test_import_copies_checks_and_notes_where_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = make_tables(tmp_path / "source")
    code, out, err = call(monkeypatch, capsys, "perf", "import", str(source))
    assert code == 0, err
    assert "Imported 1 tables (27 rows) of h100_sxm" in out
    own = own_root()
    assert own == tmp_path / "own"
    assert (own / "h100_sxm.yaml").is_file()
    assert TableStore(own, "h100_sxm", "vllm").table("gemm", "gemm_perf").number("m").size == 27
    (note,) = (own / "provenance").glob("*-import.json")
    held = json.loads(note.read_text(encoding="utf-8"))
    assert held["from"] == str(source.resolve())
    assert (held["tables"], held["rows"], held["systems"]) == (1, 27, ["h100_sxm"])


def test_import_elsewhere_says_how_to_use_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = make_tables(tmp_path / "source")
    code, out, _ = call(monkeypatch, capsys, "perf", "import", str(source), "--to", str(tmp_path / "other"))
    assert code == 0
    assert f"TUNER_TABLES={tmp_path / 'other'}" in out
    assert not own_root().exists()


def test_import_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    target = tmp_path / "own"
    with pytest.raises(InvalidValueError, match=r"holds no operation tables; the layout is <dir>/data/<system>"):
        import_tables(tmp_path, target)
    source = make_tables(tmp_path / "source")
    (source / "h100_sxm.yaml").unlink()
    with pytest.raises(InvalidValueError, match=r"no h100_sxm\.yaml with its memory"):
        import_tables(source, target)
    make_tables(source)
    bad = source / "data" / "h100_sxm" / "gemm" / "vllm" / "9.9" / "other_perf.parquet"
    pq.write_table(pa.table({"m": [1]}), bad)
    with pytest.raises(InvalidValueError, match=r"other_perf\.parquet has no column latency; it has m"):
        import_tables(source, target)
    bad.write_bytes(b"nothing")
    with pytest.raises(InvalidValueError, match="is no Parquet file"):
        import_tables(source, target)
    assert not target.exists()


def test_own_tables_take_the_place_of_public_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = make_tables(tmp_path / "public")
    make_tables(public, "a100_sxm", engine="sglang")
    make_tables(public, "a100_sxm")
    monkeypatch.setattr(tuner.table_places, "default_root", lambda: public)
    study = parse_study(GPU)
    problem = make_problem(study)
    assert tables_of(problem).own == ()
    before = look_out(study, top=0)
    assert before.notes[0] == "times from public operation tables"

    own = make_tables(own_root(), factor=4.0)
    after = look_out(study, top=0)
    assert tables_of(problem).own == ("h100_sxm",)
    assert after.notes[0] == f"times from operation tables of your own for h100_sxm ({own})"
    slow, fast = (o.defaults[0].prediction.metrics["ttft_mean_ms"] for o in (after, before))
    assert slow > 2 * fast
    merged = overlay(public, own)
    assert merged == overlay(public, own)
    found = {(row.system, row.engine) for row in coverage(merged)}
    assert found == {("h100_sxm", "vllm"), ("a100_sxm", "sglang"), ("a100_sxm", "vllm")}


def test_show_tells_rows_and_ranges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = make_tables(make_tables(tmp_path / "tables"), "a100_sxm", engine="sglang")
    code, out, err = call(monkeypatch, capsys, "perf", "show", "--tables", str(root))
    assert code == 0, err
    assert "2 tables, 54 rows" in out
    assert "h100_sxm / gemm / vllm 9.9 / gemm_perf: 27 rows" in out
    assert "m 1..4096" in out
    code, out, _ = call(monkeypatch, capsys, "perf", "show", "--tables", str(root), "--engine", "sglang", "--json")
    (row,) = json.loads(out)
    assert (row["system"], row["rows"], row["ranges"]["k"]) == ("a100_sxm", 27, [512.0, 14336.0])
    code, _, err = call(monkeypatch, capsys, "perf", "show", "--tables", str(root), "--system", "b200_sxm")
    assert code == 2
    assert "system 'b200_sxm' has no tables" in err
    assert "a100_sxm, h100_sxm" in err


def test_plots_are_one_file_that_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = make_tables(tmp_path / "tables")
    page = tmp_path / "plots" / "tables.html"
    code, out, err = call(monkeypatch, capsys, "perf", "show", "--tables", str(root), "--html", str(page))
    assert code == 0, err
    assert f"Plots: {page}" in out
    text = page.read_text(encoding="utf-8")
    assert "share of the speed of light" in text
    assert '<script src="http' not in text
    assert "Plotly.newPlot" in text


def runs_file(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


RUN: dict[str, object] = {
    "id": "1",
    "model": "meta-llama/Llama-3.1-8B",
    "system": "h100_sxm",
    "engine": "vllm",
    "precision": "bf16",
    "mode": "agg",
    "isl": 1024,
    "osl": 128,
    "concurrency": 8,
    "batch_size": 8,
    "tp": 1,
    "pp": 1,
    "dp": 1,
    "ep": 1,
    "moe_tp": 1,
    "moe_ep": 1,
    "ttft_ms": 100.0,
    "tpot_ms": 10.0,
}


def test_validate_counts_what_it_cannot_predict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    unknown = RUN | {"id": "2", "model": "nobody/nothing"}
    file = runs_file(tmp_path / "runs.csv", [RUN, unknown])
    tables = make_tables(tmp_path / "tables")
    out_file = tmp_path / "predictions" / "out.csv"
    args = ("perf", "validate", "--measurements", str(file), "--tables", str(tables), "--calibration", "none")
    code, out, err = call(monkeypatch, capsys, *args, "--json", "--predictions", str(out_file))
    assert code == 0, err
    found = json.loads(out)
    assert (found["rows"], found["predicted"]) == (2, 1)
    (reason,) = found["reasons"]
    assert "nobody/nothing" in reason
    with out_file.open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert list(row) == ["id", "ttft_ms", "tpot_ms"]
    error = abs(float(row["ttft_ms"]) / 100.0 - 1.0)
    assert found["errors"]["engine"][0]["ttft_median"] == pytest.approx(error, abs=1e-4)
    code, out, _ = call(monkeypatch, capsys, *args)
    assert "1 of 2 runs predicted, calibration: none" in out
    assert "1 x model 'nobody/nothing'" in out


def test_validate_needs_columns_and_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    short = {name: value for name, value in RUN.items() if name != "tpot_ms"}
    file = runs_file(tmp_path / "runs.csv", [short])
    tables = make_tables(tmp_path / "tables")
    code, _, err = call(monkeypatch, capsys, "perf", "validate", "--measurements", str(file), "--tables", str(tables))
    assert code == 2
    assert "lacks the columns tpot_ms; needed are id, model" in err
    monkeypatch.setattr(tuner.table_places, "default_root", lambda: None)
    code, _, err = call(monkeypatch, capsys, "perf", "validate", "--measurements", str(file))
    assert code == 2
    assert "pip install 'tuner[silicon]'" in err
    assert "--tables DIR" in err
    with pytest.raises(InvalidValueError, match="tuner perf import DIR"):
        silicon_at(None)


def test_tables_may_be_named_by_their_parent(tmp_path: Path) -> None:
    make_tables(tmp_path / "wheel" / "systems")
    assert table_roots(tmp_path / "wheel") == ((tmp_path / "wheel" / "systems").resolve(),)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(default_root() is None, reason="the extra silicon is not installed")
@pytest.mark.skipif(not MEASURED.is_file(), reason="the file of measured runs is not here")
def test_the_public_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(
        monkeypatch, capsys, "perf", "validate", "--measurements", str(MEASURED), "--calibration", "none", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["coverage"]["aggregated"] >= 0.95
    (mode,) = [row for row in found["errors"]["mode"] if row["group"] == "aggregated"]
    assert mode["ttft_median"] < 0.30
    assert mode["tpot_median"] < 0.15
