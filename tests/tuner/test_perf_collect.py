"""`tuner perf collect`: what is measured, kept, found again, and used by predictions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perf_model.batch import step_batch
from perf_model.costs import OperationCosts
from perf_model.curves import Origin
from perf_model.embedded import EmbeddedSteps
from perf_model.engine_traits import engine_traits
from perf_model.operations import Collective, Communication, Gemm
from perf_model.step_tables import (
    DECODE_TABLE,
    DEVICE_FILE,
    PREFILL_TABLE,
    REQUEST_TABLE,
    MeasuredSteps,
    measured_node,
    model_columns,
    steps_folder,
    write_device,
)
from perf_model.systems import read_system
from perf_model.tables import TableStore
from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.hardware import NodePool
from search_spaces.model_presets import TINY_MODEL
from tuner.collect_collectives import OPERATIONS, CollectiveName, measure_collective
from tuner.collect_cores import CoreCollection, Part, grid_of, system_of_cpu
from tuner.collect_gpus import QUICK_MESSAGES, GpuCollection, needed_shapes
from tuner.collect_kernels import fit_copies, kernel_facts
from tuner.collect_table import CollectedTable
from tuner.collecting import LOCAL_STUDY, Wanted, collect
from tuner.prediction import look_out
from tuner.study_file import parse_study
from tuner.table_places import measured_nodes, own_notes, remember_pool
from tuner.wiring import UNMEASURED_CORE, make_problem

GPU = """
name: gpu
model: {name: Llama-3.1-8B}
workload: {isl: 128, osl: 16, concurrency: 4}
objectives: [output_tokens_per_s_per_gpu, ttft_p50_ms]
node_pools: {h100: {device: h100_sxm, gpus_per_node: 2}}
engines: {vllm: {}}
space: {modes: aggregated, tp: [4, 8]}
calibration: none
"""
RANKS = (2,)  # those of a node of two GPUs
CPU = """
name: cores
workload: {isl: 64, osl: 16, concurrency: [1, 4]}
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {local: {cpus_per_node: 2}}
engines: {llamacpp: {threads: 1, kv_cache_dtype: f16, ubatch_size: 512, max_num_seqs: [1, 4]}}
"""


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_TABLES", str(tmp_path / "own"))
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNER_DATA", str(tmp_path / "data"))


class HereCluster:
    """Runs functions in this process, as a node would; counts the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def run_on_pool(
        self, _pool: NodePool, _devices: int, _limit_s: float, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self.calls.append(function.__name__)
        return function(*args, **kwargs)


def gpu_collection(root: Path, cluster: HereCluster, text: str = GPU) -> GpuCollection:
    study = parse_study(text)
    problem = make_problem(study)
    made = GpuCollection.begin(
        cluster,  # type: ignore[arg-type]  # what it needs of a cluster
        problem,
        problem.node_pools[0],
        study,
        root,
        quick=True,
        bench="numpy",
    )
    gemms = tuple((n // 8, k // 8, form) for n, k, form in made.gemms)  # smaller than the model's, for the test's time
    return replace(made, gemms=gemms[:3], heads=((2, 1, 16),))


def test_a_table_grows_and_knows_its_rows(tmp_path: Path) -> None:
    table = CollectedTable(tmp_path / "a" / "table.parquet")
    assert table.rows() == []
    table.add([{"m": 1, "n": 2, "latency": 0.5}])
    table.add([{"m": 2, "n": 2, "latency": 0.7}])
    assert [row["latency"] for row in table.rows()] == [0.5, 0.7]
    assert len(table.known()) == 2
    assert (("m", 1.0), ("n", 2.0)) in table.known()


def test_collected_operations_are_read_by_the_model_and_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.collect_gpus.QUICK_LENGTHS", (16, 64))
    monkeypatch.setattr("tuner.collect_gpus.QUICK_BATCHES", (1, 8))
    monkeypatch.setattr("tuner.collect_gpus.SECONDS", 0.002)
    cluster = HereCluster()
    made = gpu_collection(tmp_path / "tables", cluster)
    seen = [list(made.measure(family))[-1] for family in ("gemm", "attention")]
    assert [(done, total) for _, done, total, _ in seen] == [(12, 12), (4, 4)]
    store = TableStore(tmp_path / "tables", "h100_sxm", "vllm")
    costs = OperationCosts(store, read_system(tmp_path / "tables", "h100_sxm"), repair=False)
    n, k, form = made.gemms[0]
    curve = costs.token_curve(Gemm(name="x", n=n, k=k, count=1, format=form))
    (row,) = [r for r in made.table("gemm", "gemm_perf", "vllm").rows() if (r["n"], r["k"], r["m"]) == (n, k, 256)]
    assert curve.origin_at(256.0) is Origin.EXACT
    assert float(curve(np.array(256.0))) == pytest.approx(float(row["latency"]))

    before = len(cluster.calls)
    again = [step for family in ("gemm", "attention") for step in made.measure(family)]
    assert len(cluster.calls) == before
    assert all(done == total == found for _, done, total, found in again)


def test_copies_set_the_constants_of_small_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.collect_gpus.COPY_BYTES", (4096, 1 << 20, 1 << 24))
    made = gpu_collection(tmp_path / "tables", HereCluster())
    *_, last = made.measure("memory")
    assert last[1:3] == (3, 3)
    system = read_system(tmp_path / "tables", "h100_sxm")
    assert 0 < system.memory_efficiency < 0.2  # a CPU beside the bandwidth of an H100
    assert 1e-7 <= system.launch_s < 1e-3


def test_the_fit_of_copies_finds_share_and_constant() -> None:
    sizes = [2.0**n for n in range(12, 31)]
    times = [1e3 * (size / (0.8 * 3e12) + 2e-6) for size in sizes]
    share, launch_s = fit_copies(sizes, times, 3e12)
    assert share == pytest.approx(0.8, rel=0.01)
    assert launch_s == pytest.approx(2e-6, rel=0.01)


def test_what_torch_has_no_kernel_for_is_told(tmp_path: Path) -> None:
    made = gpu_collection(tmp_path, HereCluster(), GPU.replace("Llama-3.1-8B", "gpt-oss-20b"))
    assert "experts" in made.left_out
    assert "windowed attention" in made.left_out
    assert needed_shapes([]) == ((), (), ())


def test_a_node_without_torch_says_so() -> None:
    facts = kernel_facts("torch")
    if importlib.util.find_spec("torch") is None:
        assert "torch is not installed" in facts.problem
    else:
        assert facts.problem == "" or "sees no GPU" in facts.problem


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("operation", [*OPERATIONS, "p2p"])
def test_a_collective_between_processes(operation: CollectiveName) -> None:
    small, large = measure_collective(operation, 2, [1024, 4_194_304], "gloo")
    assert 0 < small < large


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_a_collective_that_fails_says_why() -> None:
    with pytest.raises(TunerError, match=r"all_gather over 2 GPUs failed \(code 1\): .*torch"):
        measure_collective("all_gather", 2, [1024], "gloo")


def test_collected_collectives_are_read_by_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a made-up machine stand in for those of GPUs: 5 us and a ns for each element; twice that to reduce."""

    def timed(operation: CollectiveName, ranks: int, elements: list[int], backend: str) -> list[float]:
        assert (ranks <= 8, backend) == (True, "gloo")
        return [(5e-3 + 1e-6 * size) * (2.0 if operation == "all_reduce" else 1.0) for size in elements]

    monkeypatch.setattr("tuner.collect_gpus.measure_collective", timed)
    made = gpu_collection(tmp_path / "tables", HereCluster())
    last = list(made.measure("collectives"))[-1]
    assert last[1] == last[2] == 4 * len(RANKS) * len(QUICK_MESSAGES)
    store = TableStore(tmp_path / "tables", "h100_sxm", "vllm")
    costs = OperationCosts(store, read_system(tmp_path / "tables", "h100_sxm"), repair=False)
    sizes = {"elements_per_token": 1.0, "ranks": 2, "count": 1.0}
    for kind, custom, factor in ((Collective.ALL_GATHER, False, 1.0), (Collective.ALL_REDUCE, True, 2.0)):
        curve = costs.token_curve(Communication(name="x", kind=kind, custom=custom, **sizes))
        assert float(curve(np.array(2.0**18))) == pytest.approx(factor * (5e-3 + 1e-6 * 2**18))
    assert read_system(tmp_path / "tables", "h100_sxm").hop_s == pytest.approx(5e-6 + 1e-9 * 2**10)
    assert all(done == found for _, done, _, found in made.measure("collectives"))


def test_families_and_pools_are_checked(tmp_path: Path) -> None:
    wanted = Wanted(study=parse_study(CPU), root=tmp_path)
    for change, message in (
        ({"families": ("gem",)}, "families gem are unknown; choose from steps, gemm"),
        ({"families": ("gemm",)}, "pool 'local' of cpu-core has none of the families gemm; choose from steps"),
        ({"pool": "remote"}, "node pool 'remote' is unknown; choose local"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            collect(replace(wanted, **change), None, print, lambda *_: None)  # type: ignore[arg-type]  # by keyword


def roofline(**changes: Any) -> EmbeddedSteps:
    device = replace(UNMEASURED_CORE, flops={"fp32": 1e11}, memory_bandwidth=2e10)
    base = EmbeddedSteps(
        model=TINY_MODEL,
        device=device,
        traits=engine_traits("llamacpp"),
        cores=1,
        ubatch_size=512,
        kv_cache_dtype="f16",
    )
    return replace(base, **changes)


@pytest.fixture
def steps_root(tmp_path: Path) -> Path:
    """Steps that take 1.5 times the roofline in prefill and twice in decode."""
    root, base = tmp_path / "own", roofline()
    folder = steps_folder(root, "cpu_x", "llamacpp", "1")
    write_device(folder / DEVICE_FILE, base.device)
    common = {**model_columns(TINY_MODEL), "threads": 1, "ubatch_size": 512, "kv_cache_dtype": "f16"}

    def ms(batch: Any) -> float:
        return float(base.step_ms(batch)[0])

    CollectedTable(folder / f"{PREFILL_TABLE}.parquet").add(
        common
        | {"batch_size": 1, "isl": n, "step": 0}
        | {"latency": 1.5 * ms(step_batch(prefill_tokens=[n], prefill_seqs=[1.0], prompt=[n]))}
        for n in (16, 64, 256)
    )
    CollectedTable(folder / f"{DECODE_TABLE}.parquet").add(
        common
        | {"batch_size": b, "isl": 1, "step": c}
        | {"latency": 2.0 * ms(step_batch(decode_seqs=[b], decode_context=[c]))}
        for b in (1, 2, 4)
        for c in (64, 256)
    )
    CollectedTable(folder / f"{REQUEST_TABLE}.parquet").add([common | {"latency": 0.7}])
    return root


def test_measured_steps_are_met_exactly_and_held_beyond(steps_root: Path) -> None:
    node = measured_node(steps_root, "cpu_x", "llamacpp")
    assert node is not None
    assert node.request_ms() == pytest.approx(0.7)
    base = roofline()
    steps = node.steps(base)
    assert isinstance(steps, MeasuredSteps)
    prompt = step_batch(prefill_tokens=[64.0, 2000.0], prefill_seqs=1.0, prompt=[64.0, 2000.0])
    decode = step_batch(decode_seqs=[1.0, 3.0, 64.0], decode_context=[64.0, 100.0, 4000.0])
    assert steps.step_ms(prompt) == pytest.approx(1.5 * base.step_ms(prompt))
    assert steps.step_ms(decode) == pytest.approx(2.0 * base.step_ms(decode))
    mixed = step_batch(
        prefill_tokens=[64.0], prefill_seqs=[1.0], prompt=[64.0], decode_seqs=[2.0], decode_context=[64.0]
    )
    ratio = steps.step_ms(mixed) / base.step_ms(mixed)
    assert 1.5 < float(ratio[0]) < 2.0
    assert sum(part[0] for part in steps.breakdown_ms(mixed).values()) == pytest.approx(float(steps.step_ms(mixed)[0]))


def test_measured_steps_say_where_times_come_from(steps_root: Path) -> None:
    node = measured_node(steps_root, "cpu_x", "llamacpp")
    assert node is not None
    steps = node.steps(roofline())
    for seqs, context, origin in ((2, 64, Origin.EXACT), (3, 64, Origin.INTERPOLATED), (8, 64, Origin.EXTRAPOLATED)):
        assert steps.origins(step_batch(decode_seqs=[seqs], decode_context=[context]))[origin] == pytest.approx(1.0)
    larger = replace(TINY_MODEL, hidden_size=2 * TINY_MODEL.hidden_size)
    other = node.steps(roofline(model=larger))
    batch = step_batch(decode_seqs=[2], decode_context=[64])
    assert other.origins(batch)[Origin.EXTRAPOLATED] == pytest.approx(1.0)
    assert other.step_ms(batch) == pytest.approx(2.0 * roofline(model=larger).step_ms(batch))


def test_predictions_use_what_was_collected_of_a_labelled_pool(steps_root: Path) -> None:
    study = parse_study(CPU.replace("{cpus_per_node: 2}", "{cpus_per_node: 2, labels: {kind: x}}"))
    problem = make_problem(study)
    assert measured_nodes(problem) == {}
    before = look_out(study, top=0)
    remember_pool(steps_root, problem.node_pools[0], "cpu_x")
    after = look_out(study, top=0)
    assert list(measured_nodes(problem)) == ["local"]
    (line,) = own_notes(problem)
    assert line.startswith("pool local: predictions use the steps collected on cpu_x")
    assert any("steps collected on cpu_x" in note for note in after.notes)
    assert any("NOT MEASURED" in note for note in before.notes)
    first, second = before.defaults[0], after.defaults[0]
    assert first.account is not None
    assert second.account is not None
    assert first.account.roles[0].origins[Origin.ROOFLINE] == pytest.approx(1.0)
    assert second.account.roles[0].origins[Origin.ROOFLINE] == 0.0
    assert second.prediction.log_stddev["tpot_mean_ms"] < first.prediction.log_stddev["tpot_mean_ms"]


def test_a_damaged_core_is_told(steps_root: Path) -> None:
    file = steps_folder(steps_root, "cpu_x", "llamacpp", "1") / DEVICE_FILE
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(InvalidValueError, match=r"core\.json describes no core .*; collect the node's tables anew"):
        measured_node(steps_root, "cpu_x", "llamacpp")


def test_the_grid_follows_the_study(tmp_path: Path) -> None:
    study = parse_study(LOCAL_STUDY)
    problem = make_problem(study)
    quick, full = (grid_of(study, problem.node_pools[0], quick=q) for q in (True, False))
    assert 128 in quick.prompts
    assert {seqs for seqs, _ in quick.decodes} == {1, 2, 4, 8}
    assert quick.micro_batches == (512,)
    assert len(full.micro_batches) > 1
    assert full.threads == (1,)
    made = CoreCollection(
        root=tmp_path, system="cpu_x", cpu="x", problem=problem, pool=problem.node_pools[0], grid=quick
    )
    parts = made.parts()
    assert sum(part.points for part in parts) == len(quick.prompts) + len(quick.decodes)
    done = parts[0]
    made.table("prefill").add(made.row(done, "prefill", 1, n) | {"latency": 1.0} for n in done.prompts)
    assert sum(part.points for part in made.parts()) == len(quick.decodes)
    assert isinstance(done, Part)


def test_processors_have_names_of_tables() -> None:
    assert system_of_cpu("Intel(R) Xeon(R) Platinum 8481C @ 2.70GHz") == "cpu_intel_r_xeon_r_platinum_8481c_2_70ghz"


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="the extra llamacpp is not installed")
def test_steps_of_the_engine_are_collected_and_predicted_from(tmp_path: Path) -> None:
    """A real engine on a real Ray node; a second collection finds everything there."""
    file = tmp_path / "study.yaml"
    file.write_text(CPU, encoding="utf-8")
    command = [sys.executable, "-m", "tuner.cli", "perf", "collect", str(file), "--quick"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert first.returncode == 0, first.stderr
    assert "points measured, 0 were there" in first.stdout
    second = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert "local: 0 points measured" in second.stdout, second.stderr
    assert len(list((tmp_path / "own" / "provenance").glob("*-collect.json"))) == 2

    told = subprocess.run(
        [sys.executable, "-m", "tuner.cli", "predict", str(file), "--json", "--top", "0"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found = json.loads(told.stdout)
    assert any("steps collected on cpu_" in note for note in found["notes"])
    assert found["defaults"][0]["roles"][0]["time_from"]["roofline"] == 0.0
