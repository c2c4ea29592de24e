from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from cluster.engines.llamacpp import LlamaCppBackend
from cluster.janitor import tagged_processes
from cluster.node_facts import usable_cores
from cluster.ray_runner import RayTrialRunner
from cluster.ray_session import RayCluster
from cluster.runner import Running, TrialHandle, TrialRunner
from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome
from search_spaces.serving import Parallelism, ServingConfig
from tests.support.processes import is_alive, wait_until_gone
from tests.support.ray_faulty import FaultyBackend
from tests.support.ray_problem import LIMITS, POOL, PROBLEM, aggregated, disaggregated, request

pytestmark = [pytest.mark.ray, pytest.mark.engine]

STUDY = f"runner-tests-{os.getpid()}"
ENDLESS = MeasurementRule(requests=5_000, lateness_limit_ms=5000.0)
WAIT_S = 90.0

MakeRunner = Callable[..., RayTrialRunner]


@pytest.fixture
def make_runner(ray_cluster: RayCluster, tmp_path: Path) -> Iterator[MakeRunner]:
    """Makes runners that are closed with the test; afterwards nothing of the study runs."""
    made: list[RayTrialRunner] = []

    def make(fault: str = "exits") -> RayTrialRunner:
        backends = {"llamacpp": LlamaCppBackend(), "faulty": FaultyBackend(fault)}
        made.append(
            RayTrialRunner(study=STUDY, backends=backends, cluster=ray_cluster, work_dir=tmp_path / "deployments")
        )
        return made[-1]

    yield make
    for runner in made:
        runner.close()
    assert tagged_processes(STUDY) == []


def finish(runner: TrialRunner, handle: TrialHandle) -> Outcome:
    deadline = time.monotonic() + WAIT_S
    while isinstance(state := runner.poll(handle), Running):
        assert time.monotonic() < deadline, f"{handle} is still in {state}"
        time.sleep(0.02)
    return state


def reach(runner: TrialRunner, handle: TrialHandle, phase: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while (state := runner.poll(handle)) != phase:
        assert isinstance(state, Running), state
        if state.phase == phase:
            return
        assert time.monotonic() < deadline, f"{handle} never came to {phase}"
        time.sleep(0.02)


def measured(outcome: Outcome) -> Measurement:
    assert isinstance(outcome, Measurement), outcome
    return outcome


def failed(outcome: Outcome) -> Failure:
    assert isinstance(outcome, Failure), outcome
    return outcome


def pids(runner: RayTrialRunner) -> list[int]:
    return [pid for processes in runner.processes().values() for pid in processes.values()]


def test_a_deployment_is_measured_at_two_loads_with_one_start(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    config = aggregated()
    first = measured(finish(runner, runner.start(request("a0", config, tmp_path, concurrency=1))))
    assert runner.warm() == (config,)
    (pid,) = pids(runner)
    second = measured(finish(runner, runner.start(request("a1", config, tmp_path, concurrency=4, seed=1))))
    assert pids(runner) == [pid]
    assert first.timings_s.keys() == {"placement", "start", "warm_up", "measure"}
    assert second.timings_s.keys() == {"warm_up", "measure"}
    assert first.metrics.requests == second.metrics.requests == 16
    assert min(first.metrics.output_tokens_per_s, second.metrics.output_tokens_per_s) > 0
    assert first.metrics.price_per_hour == 0.25
    assert pq.read_table(first.artifacts["request_timings"]).num_rows >= 16
    assert "serving tiny" in Path(first.artifacts["log_mixed-0"]).read_text()
    runner.release()
    assert runner.warm() == ()
    assert not is_alive(pid)


def test_what_a_measurement_ran_on_is_recorded(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    handle = runner.start(request("e0", aggregated(), tmp_path))
    reach(runner, handle, "measure")
    (pid,) = pids(runner)
    used = sorted(psutil.Process(pid).cpu_affinity())
    environ = psutil.Process(pid).environ()
    environment = measured(finish(runner, handle)).environment
    assert environment["cores.mixed-0"] == ",".join(map(str, used))
    assert environment["engine_version"] == LlamaCppBackend().version()
    assert environment["cores.client"] != environment["cores.mixed-0"]
    assert environment["cores"] == "own"
    assert {"python", "ray", "nodes", "cpu_model", "oversubscribed"} <= environment.keys()
    assert (environ["TUNER_STUDY"], environ["TUNER_TRIAL"]) == (STUDY, "e0")


def test_prefill_and_decode_replicas_behind_the_router(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    outcome = measured(finish(runner, runner.start(request("d0", disaggregated(), tmp_path))))
    assert len(pids(runner)) == 3
    assert {"log_prefill-0", "log_decode-0", "log_router"} <= outcome.artifacts.keys()
    stats = json.loads(Path(outcome.artifacts["router_stats"]).read_text())
    assert stats["summary"]["hand_over_ms"]["count"] >= 16
    assert stats["summary"]["decode_prompt_n"]["max"] <= 1


def test_a_warm_deployment_makes_way_for_another_configuration(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    measured(finish(runner, runner.start(request("w0", aggregated(), tmp_path))))
    (pid,) = pids(runner)
    measured(finish(runner, runner.start(request("w1", aggregated(replicas=2), tmp_path))))
    assert runner.warm() == (aggregated(replicas=2),)
    assert not is_alive(pid)


def test_two_trials_run_at_once_on_cores_of_their_own(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    small, other = aggregated(), aggregated(max_num_seqs=2)
    handles = [
        runner.start(request(f"c{i}", c, tmp_path, rule=ENDLESS, limits=replace(LIMITS, measure_s=600)))
        for i, c in enumerate((small, other))
    ]
    for handle in handles:
        reach(runner, handle, "measure")
    used = [tuple(psutil.Process(pid).cpu_affinity()) for pid in pids(runner)]
    assert len(used) == 2
    assert used[0] != used[1] or len(usable_cores()) < 3
    for handle in handles:
        runner.stop(handle)
        assert failed(runner.poll(handle)).detail.endswith("was stopped before it was measured")
    assert pids(runner) == []


def test_trials_of_one_configuration_take_turns_on_its_deployment(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    handles = [runner.start(request(f"q{i}", aggregated(), tmp_path, seed=i)) for i in range(3)]
    outcomes = [measured(finish(runner, handle)) for handle in handles]
    assert ["start" in outcome.timings_s for outcome in outcomes] == [True, False, False]


def test_an_engine_that_exits_at_boot(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner("exits")
    failure = failed(finish(runner, runner.start(request("f0", aggregated(engine="faulty"), tmp_path))))
    assert failure.reason is FailureReason.INVALID_FLAGS
    assert failure.detail == "mixed-0 exited with code 64 before it served"
    assert failure.log_tail == "the flag --frobnicate is unknown"
    assert "frobnicate" in Path(failure.artifacts["log_mixed-0"]).read_text()
    assert failure.timings_s.keys() == {"placement", "start", "stop"}
    assert failure.environment["engine_version"] == "faulty 1"


def test_an_engine_that_is_never_ready(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner("hangs")
    limits = replace(LIMITS, start_s=10.0)
    failure = failed(finish(runner, runner.start(request("f1", aggregated(engine="faulty"), tmp_path, limits=limits))))
    assert failure.reason is FailureReason.STARTUP_TIMEOUT
    assert failure.log_tail.endswith("loading for ever"), "with the name of the process where the limit came first"
    assert tagged_processes(STUDY) == []


def test_a_bug_in_an_actor_is_a_failure_with_its_cause(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner("bug")
    failure = failed(finish(runner, runner.start(request("f2", aggregated(engine="faulty"), tmp_path))))
    assert failure.reason is FailureReason.UNHEALTHY_NODE
    assert "ZeroDivisionError: a bug of the backend" in failure.detail


def test_a_model_that_cannot_be_loaded(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF and then nothing of use")
    asked = request("f3", aggregated(), tmp_path)
    problem = replace(asked.problem, model=replace(asked.problem.model, source=str(bad)))
    failure = failed(finish(runner, runner.start(replace(asked, problem=problem))))
    assert failure.reason is FailureReason.INVALID_FLAGS
    assert "bad.gguf" in failure.log_tail + failure.detail


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGSEGV, FailureReason.ENGINE_CRASH), (signal.SIGKILL, FailureReason.UNHEALTHY_NODE)],
)
def test_an_engine_that_dies_under_load(
    number: signal.Signals, reason: FailureReason, make_runner: MakeRunner, tmp_path: Path
) -> None:
    runner = make_runner()
    handle = runner.start(request("f4", aggregated(), tmp_path, rule=ENDLESS))
    reach(runner, handle, "measure")
    (pid,) = pids(runner)
    os.kill(pid, number)
    failure = failed(finish(runner, handle))
    assert failure.reason is reason
    assert f"mixed-0 was ended by signal {number.value} under load" in failure.detail
    assert ("not by the kernel for want of memory" in failure.detail) == (number is signal.SIGKILL)
    assert "serving tiny" in failure.log_tail
    again = measured(finish(runner, runner.start(request("f5", aggregated(), tmp_path))))
    assert "start" in again.timings_s


def test_engines_and_router_let_nobody_in_without_the_key(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    handle = runner.start(request("s0", disaggregated(), tmp_path, rule=ENDLESS))
    reach(runner, handle, "measure")
    (deployment,) = runner._deployments
    key = deployment._site.api_key
    for name, serving in deployment._serving.items():
        process = psutil.Process(serving.pid)
        listening = {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}, name
        assert status(f"{serving.url}/health") == 200
        metrics = "/router/stats" if name == "router" else "/metrics"
        for path in ("/v1/completions", metrics, "/slots"):
            assert status(f"{serving.url}{path}") == 401, (name, path)
        assert status(f"{serving.url}{metrics}", key) == 200
        assert not any(key in argument for argument in process.cmdline())
        assert key not in repr(serving)
    runner.stop(handle)


def status(url: str, key: str | None = None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:  # noqa: S310  the test's own servers
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_an_actor_that_is_killed_takes_its_engine_along(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    handle = runner.start(request("k0", aggregated(), tmp_path, rule=ENDLESS))
    reach(runner, handle, "measure")
    (pid,) = pids(runner)
    actor = psutil.Process(pid).parent()
    assert actor is not None
    assert "ProcessActor" in actor.name() + " ".join(actor.cmdline())
    actor.kill()
    failure = failed(finish(runner, handle))
    assert failure.reason is FailureReason.UNHEALTHY_NODE
    assert "the actor of mixed-0" in failure.detail
    wait_until_gone(pid, 5.0)


def test_an_idle_engine_that_dies_is_no_longer_warm(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    measured(finish(runner, runner.start(request("i0", aggregated(), tmp_path))))
    (pid,) = pids(runner)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20.0
    while runner.warm():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_load_that_takes_too_long(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    limits = replace(LIMITS, measure_s=1.0)
    handle = runner.start(request("f6", aggregated(), tmp_path, rule=ENDLESS, limits=limits))
    failure = failed(finish(runner, handle))
    assert failure.reason is FailureReason.MEASUREMENT_TIMEOUT
    assert "after 1 s under concurrency=2" in failure.detail
    assert pq.read_table(failure.artifacts["request_timings"]).num_rows > 0


def test_a_late_client_is_no_fault_of_the_deployment(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    rule = MeasurementRule(requests=16, lateness_limit_ms=0.001)
    failure = failed(finish(runner, runner.start(request("f7", aggregated(), tmp_path, rule=rule))))
    assert failure.reason is FailureReason.LATE_CLIENT
    assert runner.warm() == (aggregated(),)


def test_devices_that_another_program_keeps(make_runner: MakeRunner, tmp_path: Path) -> None:
    holder, runner = make_runner(), make_runner()
    held = holder.start(request("b0", aggregated(replicas=2), tmp_path, rule=ENDLESS))
    reach(holder, held, "measure")
    limits = TimeLimits(placement_s=1.0, start_s=60, measure_s=60, stop_s=10)
    failure = failed(finish(runner, runner.start(request("b1", aggregated(), tmp_path, limits=limits))))
    assert failure.reason is FailureReason.PLACEMENT
    assert "placement_s=1 s" in failure.detail
    assert isinstance(holder.poll(held), Running)


@pytest.mark.long
def test_a_trial_waits_for_the_devices_of_the_runners_own_trials(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    holder = runner.start(request("w0", aggregated(replicas=2), tmp_path, rule=ENDLESS))
    reach(runner, holder, "measure")
    limits = TimeLimits(placement_s=5.0, start_s=60, measure_s=60, stop_s=10)
    waiting = runner.start(request("w1", aggregated(), tmp_path, limits=limits))
    stopped = runner.start(request("w2", aggregated(max_num_seqs=2), tmp_path, limits=limits))
    deadline = time.monotonic() + limits.placement_s + 1.5
    while time.monotonic() < deadline:
        state = runner.poll(waiting)
        assert isinstance(state, Running)
        assert state.phase == "placement"
        time.sleep(0.05)
    runner.stop(stopped)
    assert failed(runner.poll(stopped)).reason is FailureReason.LOST_COORDINATOR
    runner.stop(holder)
    measured(finish(runner, waiting))


def test_a_configuration_that_no_node_holds(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    failure = failed(runner.poll(runner.start(request("n0", aggregated(replicas=9), tmp_path))))
    assert failure.reason is FailureReason.PLACEMENT
    assert "9 replicas of 1 devices" in failure.detail


def test_an_engine_that_cannot_span_nodes_says_so_before_anything_starts(
    make_runner: MakeRunner, tmp_path: Path
) -> None:
    runner = make_runner()
    problem = replace(PROBLEM, node_pools=(replace(POOL, nodes=2, devices_per_node=1),))
    stages = replace(aggregated().pools[0], parallelism=Parallelism(pp=2))
    config = ServingConfig(engine="llamacpp", pools=(stages,))
    failure = failed(runner.poll(runner.start(request("n4", config, tmp_path, problem=problem))))
    assert failure.reason is FailureReason.INVALID_FLAGS, "the same configuration could never run: no node is to blame"
    assert "mixed-0.0, mixed-0.1 would be parts of a replica that spans nodes: engine llamacpp cannot" in failure.detail
    assert runner.processes() == {}


def test_trials_have_names_of_their_own_and_known_engines(make_runner: MakeRunner, tmp_path: Path) -> None:
    runner = make_runner()
    runner.start(request("n1", aggregated(replicas=9), tmp_path))
    with pytest.raises(InvalidValueError, match="'n1' was started before"):
        runner.start(request("n1", aggregated(replicas=9), tmp_path))
    with pytest.raises(InvalidValueError, match="engine 'warp' is unknown; choose llamacpp, faulty"):
        runner.start(request("n2", ServingConfig(engine="warp", pools=aggregated().pools), tmp_path))
    with pytest.raises(InvalidValueError, match="'n9' is unknown"):
        runner.poll(TrialHandle(trial="n9", config_key="k"))
    runner.close()
    with pytest.raises(TunerError, match="closed"):
        runner.start(request("n3", aggregated(), tmp_path))
