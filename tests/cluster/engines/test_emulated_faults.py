"""Every class of failure that an engine can produce, produced for real and found classified with the engine's words."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engines.emulated import EmulatedBackend
from cluster.engines.log_signs import reason_in_log
from cluster.load.driver import LoadRun
from cluster.load.measure import LoadMeasurement, measure
from search_spaces.emulation import EngineProfile, Fault, FaultKind, FaultPlan, GpuMemory
from search_spaces.errors import InvalidValueError
from search_spaces.measuring import MeasurementRule
from search_spaces.outcome import Failure, FailureReason
from search_spaces.serving import Role, ServingConfig
from search_spaces.workload import Arrival, Length, Load, Workload
from tests.support.emulated import BIG_MODEL, GIB, WORKLOAD, backend, flat_times, pool, profile, replica, replica_spec
from tests.support.processes import child

BOOT_LIMIT_S = 20.0
FAST = Workload(isl=Length(mean=32), osl=Length(mean=8))


def death(directory: Path, engine: EmulatedBackend, **options: object) -> tuple[FailureReason, str]:
    """Class and log of a replica that ends before it serves."""
    with replica(directory, engine, pool(**options), healthy=False) as (_, process):  # type: ignore[arg-type]  # options
        code = process.wait(BOOT_LIMIT_S)
        return engine.classify(code, process.log, ready=False), process.log


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        (FaultKind.OUT_OF_MEMORY_AT_BOOT, FailureReason.OUT_OF_MEMORY_AT_BOOT, "CUDA out of memory"),
        (FaultKind.KV_CACHE_TOO_SMALL, FailureReason.KV_CACHE_TOO_SMALL, "can be stored in KV cache (640)"),
        (FaultKind.INVALID_FLAGS, FailureReason.INVALID_FLAGS, "unrecognized arguments: --on-request"),
        (FaultKind.CRASH_AT_BOOT, FailureReason.ENGINE_CRASH, "Segmentation fault"),
        (FaultKind.PORT_IN_USE, FailureReason.TRANSPORT, "address already in use"),
    ],
)
def test_faults_at_boot(kind: FaultKind, reason: FailureReason, words: str, tmp_path: Path) -> None:
    found, log = death(tmp_path, backend(Fault(kind=kind)))
    assert found is reason
    assert words in log


def small(total: float, weights: float) -> GpuMemory:
    return GpuMemory(
        total_bytes=total * GIB, weight_bytes=weights * GIB, fixed_bytes=4 * GIB, kv_bytes_per_token=320 * 1024.0
    )


@pytest.mark.engine
@pytest.mark.parametrize(
    ("memory", "options", "reason", "words"),
    [
        (small(80, 131), {}, FailureReason.OUT_OF_MEMORY_AT_BOOT, "total capacity of 80.00 GiB"),
        (small(80, 67.8), {}, FailureReason.KV_CACHE_TOO_SMALL, "a request holds up to 1280 tokens"),
        (small(80, 70), {"gpu_memory_utilization": 0.7}, FailureReason.KV_CACHE_TOO_SMALL, "KV cache (0)"),
        (
            small(80, 40),
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024},
            FailureReason.INVALID_FLAGS,
            "max_num_batched_tokens=1024 is below max_model_len=1280",
        ),
        (
            small(80, 40),
            {"max_num_batched_tokens": 256, "max_num_seqs": 512},
            FailureReason.INVALID_FLAGS,
            "max_num_batched_tokens=256 is below max_num_seqs=512",
        ),
    ],
)
def test_configurations_that_do_not_fit_the_gpu(
    memory: GpuMemory, options: dict[str, object], reason: FailureReason, words: str, tmp_path: Path
) -> None:
    found, log = death(tmp_path, backend(memory=memory), **options)
    assert found is reason
    assert words in log


@pytest.mark.engine
def test_a_port_that_is_taken(tmp_path: Path) -> None:
    engine = backend()
    with replica(tmp_path, engine, pool()) as (url, _):
        taken = int(url.rsplit(":", 1)[1])
        spec = replica_spec(tmp_path, pool(), port=taken, index=1)
        command = engine.replica_command(spec)
        command.write_files()
        with child(command.argv, tmp_path / "second.log") as second:
            code = second.wait(BOOT_LIMIT_S)
            assert engine.classify(code, second.log, ready=False) is FailureReason.TRANSPORT


@pytest.mark.engine
def test_a_bad_option_of_the_process(tmp_path: Path) -> None:
    engine = backend()
    found, log = death(tmp_path, engine, gpu_memory_utilization=1.5)
    assert found is FailureReason.INVALID_FLAGS
    assert "gpu_memory_utilization=1.5" in log


@pytest.mark.engine
def test_a_start_that_hangs_and_one_that_is_slow(tmp_path: Path) -> None:
    hangs = backend(Fault(kind=FaultKind.HANG_AT_BOOT))
    with replica(tmp_path, hangs, pool(), healthy=False) as (_, process):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.0)
        assert "emulated hang" in process.log
        assert hangs.classify(None, process.log, ready=False) is FailureReason.STARTUP_TIMEOUT
    slow = backend(Fault(kind=FaultKind.SLOW_START, seconds=1.0))
    with replica(tmp_path, slow, pool()) as (_, process):
        assert "takes 1 s more than usual" in process.log


@pytest.mark.engine
def test_a_fault_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_EMULATED_FAULT", "crash_at_boot")
    assert death(tmp_path, backend())[0] is FailureReason.ENGINE_CRASH
    monkeypatch.setenv("TUNER_EMULATED_FAULT", "meltdown")
    found, log = death(tmp_path, backend())
    assert found is FailureReason.INVALID_FLAGS
    assert "fault 'meltdown' is unknown" in log


def under_load(directory: Path, fault: Fault, *, limit_s: float = 20.0) -> tuple[FailureReason, str, Failure]:
    """Class by the engine's end (or the load's, where it lives), its log, and what the load generator says."""
    engine = backend(fault, times=flat_times(decode_ms=2.0))
    with replica(directory, engine, pool()) as (url, process):
        run = LoadRun(
            url=url,
            model_name=BIG_MODEL.name,
            workload=FAST,
            load=Load(arrival=Arrival.CLOSED, value=4),
            vocab_size=1000,
            seed=0,
            rule=MeasurementRule(requests=24, lateness_limit_ms=5000.0),
            limit_s=limit_s,
            timings_path=directory / "timings.parquet",
        )
        outcome = measure(run, slos=(), devices=1, price_per_hour=1.0)
        assert isinstance(outcome, Failure)
        code = process.process.poll() if outcome.reason is FailureReason.MEASUREMENT_TIMEOUT else _end(process.process)
        reason = outcome.reason if code is None else engine.classify(code, process.log, ready=True)
        return reason, process.log, outcome


def _end(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process that is about to end, None where it lives on."""
    try:
        return process.wait(1.0)
    except subprocess.TimeoutExpired:
        return None


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        (FaultKind.OUT_OF_MEMORY_UNDER_LOAD, FailureReason.OUT_OF_MEMORY_UNDER_LOAD, "CUDA out of memory"),
        (FaultKind.CRASH_UNDER_LOAD, FailureReason.ENGINE_CRASH, "Segmentation fault"),
        (FaultKind.DEVICE_LOST, FailureReason.UNHEALTHY_NODE, "uncorrectable ECC"),
        (FaultKind.DROP_STREAMS, FailureReason.REQUESTS_FAILED, "serving big"),
        (FaultKind.GARBAGE, FailureReason.REQUESTS_FAILED, "serving big"),
        (FaultKind.STOP_LISTENING, FailureReason.TRANSPORT, "serving big"),
    ],
)
def test_faults_under_load(kind: FaultKind, reason: FailureReason, words: str, tmp_path: Path) -> None:
    found, log, outcome = under_load(tmp_path, Fault(kind=kind))
    assert found is reason, outcome
    assert words in log


@pytest.mark.engine
def test_an_engine_that_hangs_under_load(tmp_path: Path) -> None:
    found, _, outcome = under_load(tmp_path, Fault(kind=FaultKind.HANG_UNDER_LOAD), limit_s=3.0)
    assert found is FailureReason.MEASUREMENT_TIMEOUT
    assert "measured requests" in outcome.detail


@pytest.mark.engine
def test_streams_dropped_within_the_error_limit_are_no_failure(tmp_path: Path) -> None:
    engine = backend(Fault(kind=FaultKind.DROP_STREAMS, share=0.05), times=flat_times(decode_ms=2.0))
    with replica(tmp_path, engine, pool()) as (url, _):
        run = LoadRun(
            url=url,
            model_name=BIG_MODEL.name,
            workload=FAST,
            load=Load(arrival=Arrival.CLOSED, value=4),
            vocab_size=1000,
            seed=0,
            rule=MeasurementRule(requests=64, lateness_limit_ms=5000.0, error_limit=0.3),
            limit_s=20.0,
            timings_path=tmp_path / "timings.parquet",
        )
        outcome = measure(run, slos=(), devices=1, price_per_hour=1.0)
    assert isinstance(outcome, LoadMeasurement), outcome
    assert 0 < outcome.metrics.errors < 20


def test_an_engine_killed_from_outside_is_its_nodes_fault() -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        assert backend().classify(-number, "serving big", ready=True) is FailureReason.UNHEALTHY_NODE
    assert backend().classify(-signal.SIGKILL, "CUDA out of memory", ready=True).is_infrastructure is False
    assert backend().classify(1, "something else", ready=False) is FailureReason.ENGINE_CRASH


@pytest.mark.parametrize(
    ("text", "ready", "reason"),
    [
        ("torch.cuda.OutOfMemoryError: CUDA out of memory.", True, FailureReason.OUT_OF_MEMORY_UNDER_LOAD),
        ("RuntimeError: CUBLAS_STATUS_ALLOC_FAILED", False, FailureReason.OUT_OF_MEMORY_AT_BOOT),
        ("ValueError: No available memory for the cache blocks.", False, FailureReason.KV_CACHE_TOO_SMALL),
        ("NVRM: Xid 79, GPU has fallen off the bus", True, FailureReason.UNHEALTHY_NODE),
        ("api_server.py: error: argument --dtype: invalid choice: 'x'", False, FailureReason.INVALID_FLAGS),
        ("INFO all is well", True, None),
    ],
)
def test_the_words_of_gpu_engines(text: str, ready: bool, reason: FailureReason | None) -> None:
    assert reason_in_log(text, ready=ready) is reason


def test_a_plan_strikes_one_replica_of_a_trial(tmp_path: Path) -> None:
    plan = FaultPlan(shares={FaultKind.CRASH_UNDER_LOAD: 1.0})
    engine = replace(backend(), plan=plan)
    pools = {role: pool(role) for role in (Role.PREFILL, Role.DECODE)}
    struck = []
    for own, peer in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        for index in range(2):
            spec = replica_spec(tmp_path, pools[own], pools[peer], index=index)
            (text,) = engine.replica_command(spec).files.values()
            struck.append(json.loads(text)["fault"])
    assert sum(fault is not None for fault in struck) == 1


def test_a_configuration_without_a_profile_says_why_when_it_is_launched(tmp_path: Path) -> None:
    def refuse(_config: object, _problem: object) -> dict[Role, EngineProfile]:
        raise InvalidValueError("tp=3 does not divide 64 attention heads")

    config = ServingConfig(engine="emulated", pools=(pool(),))
    asked = EmulatedBackend(source=refuse).for_deployment(config, None)  # type: ignore[arg-type]  # not looked at
    with pytest.raises(InvalidValueError, match="tp=3"):
        asked.replica_command(replica_spec(tmp_path, pool()))
    with pytest.raises(InvalidValueError, match="no profile"):
        EmulatedBackend().replica_command(replica_spec(tmp_path, pool()))


def test_what_travels_to_the_nodes_is_data_alone() -> None:
    given = {Role.MIXED: profile()}
    config = ServingConfig(engine="emulated", pools=(pool(),))
    bound = EmulatedBackend(source=lambda _c, _p: given).for_deployment(config, None)  # type: ignore[arg-type]  # not used
    assert pickle.loads(pickle.dumps(bound)).profiles == given  # noqa: S301 - the test's own
    assert bound.version() == "EMULATED 1 x h100_sxm"
    assert WORKLOAD.longest_context == 1280
