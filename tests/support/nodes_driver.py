"""A driver on a Ray cluster of several nodes of this machine: replicas over nodes, nodes that die or fall silent.

    python -m tests.support.nodes_driver FOLDER [SCENARIO...]

A process of its own, as a driver joins one Ray at a time and the test session has its own. Every node has an address of
its own, so that what listens where is told apart. Writes what became of every scenario to
FOLDER/answers.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from cluster.engines.emulated import EmulatedBackend
from cluster.engines.emulated_memory import hold
from cluster.processes import ProcessId, Tags
from cluster.ray_emulated import OBJECT_STORE_BYTES
from cluster.ray_nodes import WatchRule
from cluster.ray_runner import RayTrialRunner
from cluster.ray_session import RayCluster, connect
from cluster.runner import Running, TrialHandle, TrialRequest
from search_spaces.emulation import Fault, FaultKind
from search_spaces.hardware import NodePool
from search_spaces.known_gpus import known_gpu
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.outcome import Outcome
from search_spaces.problem import Objective, Problem
from search_spaces.serving import Candidate, Parallelism, Pool, Role, ServingConfig
from search_spaces.workload import Arrival, Length, Load, Workload
from tests.support.emulated import BIG_MODEL, backend
from tests.support.emulated_driver import said

STUDY = f"nodes-{os.getpid()}"
GPUS, CPUS = 2, 4
COMMON: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
POOL = NodePool(
    name="h100",
    device=known_gpu("h100_sxm"),
    nodes=3,
    devices_per_node=GPUS,
    price_per_hour=6.0,
    labels={"gpu": "h100"},
)
APART = replace(POOL, name="apart", nodes=1, labels={"gpu": "apart"})
PROBLEM = Problem(
    model=BIG_MODEL,
    workload=Workload(isl=Length(mean=64), osl=Length(mean=8)),
    node_pools=(POOL, APART),
    objectives=(Objective(metric="ttft_p50_ms"), Objective(metric="tpot_p50_ms")),
)
LIMITS = TimeLimits(placement_s=30, start_s=60, measure_s=60, stop_s=5)
SHORT = MeasurementRule(requests=12, lateness_limit_ms=5000.0)
ENDLESS = MeasurementRule(requests=100_000, lateness_limit_ms=5000.0)
RULE = WatchRule(beat_s=0.5, silence_s=5.0, scan_s=1.0)
WAIT_S = 120.0


def mixed(**sizes: int) -> ServingConfig:
    """A replica of the emulated engine of these sizes."""
    pool = Pool(role=Role.MIXED, node_pool=POOL.name, parallelism=Parallelism(**sizes))
    return ServingConfig(engine="emulated", pools=(pool,))


OVER_TWO_NODES, OVER_THREE_NODES, ON_ONE_NODE = mixed(tp=2, pp=2), mixed(tp=2, dp=3), mixed(tp=2)


class Nodes:
    """A head without GPUs and three nodes with GPUs that are not there."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster()
        self._cluster.add_node(num_cpus=4, **COMMON)
        self._nodes: list[Any] = []
        for number in range(1, POOL.nodes + 1):
            self._add(number)

    def _add(self, number: int) -> None:
        address = f"127.0.1.{number}"
        self._nodes.append(
            self._cluster.add_node(
                num_cpus=CPUS, num_gpus=GPUS, labels={"gpu": "h100"}, node_ip_address=address, **COMMON
            )
        )

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def family(self, node_id: str) -> list[psutil.Process]:
        """The raylet of a node and everything that it has started."""
        node = next(node for node in self._nodes if node.node_id == node_id)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def kill(self, node_id: str) -> None:
        """Kill the raylet of a node as it stands."""
        self.family(node_id)[0].kill()

    def replace(self, node_id: str) -> None:
        """Kill everything of a node, and put another in its place."""
        for process in self.family(node_id):
            process.kill()
        self._add(len(self._nodes) + 1)

    def close(self) -> None:
        self._cluster.shutdown()


class Trials:
    """Runs trials one after the other."""

    def __init__(self, cluster: RayCluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self._count = 0

    @contextmanager
    def runner(self, engine: EmulatedBackend | None = None) -> Iterator[RayTrialRunner]:
        with RayTrialRunner(
            study=STUDY,
            backends={"emulated": engine or backend()},
            cluster=self._cluster,
            work_dir=self._folder / "deployments",
            rule=RULE,
        ) as runner:
            yield runner

    def start(
        self,
        runner: RayTrialRunner,
        config: ServingConfig,
        rule: MeasurementRule = SHORT,
        limits: TimeLimits = LIMITS,
    ) -> TrialHandle:
        self._count += 1
        name = f"t{self._count}"
        return runner.start(
            TrialRequest(
                trial=name,
                candidate=Candidate(config=config, load=Load(arrival=Arrival.CLOSED, value=2)),
                problem=PROBLEM,
                rule=rule,
                limits=limits,
                artifact_dir=self._folder / name,
                seed=1,
            )
        )

    def once(self, config: ServingConfig, engine: EmulatedBackend | None = None) -> dict[str, object]:
        """Measure `config` on a deployment of its own."""
        with self.runner(engine) as runner:
            handle = self.start(runner, config)
            places: dict[str, str] = {}
            outcome = wait(runner, handle, lambda: places.update(hosts(runner)))
            return {"hosts": places, "folder": self.folder(handle), **told(outcome)}

    def folder(self, handle: TrialHandle) -> Path:
        """Where the files of a trial are."""
        return self._folder / handle.trial


def wait(runner: RayTrialRunner, handle: TrialHandle, look: Callable[[], object] = lambda: None) -> Outcome:
    deadline = time.monotonic() + WAIT_S
    while isinstance(state := runner.poll(handle), Running):
        assert time.monotonic() < deadline, f"{handle} is still in {state}"
        look()
        time.sleep(0.02)
    return state


def reach(runner: RayTrialRunner, handle: TrialHandle, phase: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (isinstance(state := runner.poll(handle), Running) and state.phase == phase):
        assert isinstance(state, Running), state
        assert time.monotonic() < deadline, f"{handle} never came to {phase}"
        time.sleep(0.02)


def hosts(runner: RayTrialRunner) -> dict[str, str]:
    """The address that every part of the deployments that are up listens on."""
    return {name: seat.host for deployment in runner._deployments for name, seat in deployment._seats._taken.items()}


def node_ids(runner: RayTrialRunner) -> set[str]:
    """The nodes of the newest deployment."""
    return {facts.node_id for deployment in runner._deployments[-1:] for facts in deployment._seats.facts.values()}


def node_of(runner: RayTrialRunner, part: str) -> str:
    return runner._deployments[0]._seats.facts[part].node_id


def told(outcome: Outcome) -> dict[str, object]:
    processes = getattr(outcome, "processes", ())
    return {**said(outcome), "parts": [None if p.part is None else p.part.rank for p in processes]}


def spans(trials: Trials) -> dict[str, object]:
    """Replicas over nodes, sound and with faults of the part that does not lead."""
    out_of_memory = replace(backend(Fault(kind=FaultKind.OUT_OF_MEMORY_UNDER_LOAD, after_requests=3)), fault_rank=1)
    crash = replace(backend(Fault(kind=FaultKind.CRASH_AT_BOOT)), fault_rank=1)
    leader = backend(Fault(kind=FaultKind.CRASH_UNDER_LOAD, after_requests=3))
    return {
        "stages": trials.once(OVER_TWO_NODES),
        "ranks": trials.once(OVER_THREE_NODES),
        "out_of_memory": trials.once(OVER_TWO_NODES, out_of_memory),
        "crash_at_boot": trials.once(OVER_TWO_NODES, crash),
        "crash_of_leader": trials.once(OVER_TWO_NODES, leader),
    }


def memory(trials: Trials, folder: Path) -> dict[str, object]:
    """GPUs whose memory somebody else holds: for ever, and for a while."""
    engine = replace(backend(), ledger=folder / "ledger")
    answers: dict[str, object] = {}
    for name, held_s in (("held", WAIT_S), ("held_for_a_while", 3.0)):
        with trials.runner(engine) as runner:
            limits = replace(LIMITS, start_s=6.0 if name == "held" else 30.0)
            for node in runner._cluster.nodes():
                hold(engine.ledger / node.node_id, range(GPUS), 30e9)
            handle = trials.start(runner, ON_ONE_NODE, limits=limits)
            began = time.monotonic()

            def give_up(began: float = began, held_s: float = held_s) -> None:
                if time.monotonic() - began > held_s:
                    for file in engine.ledger.glob(f"*/*.{os.getpid()}"):
                        file.unlink()

            answers[name] = {**told(wait(runner, handle, give_up)), "took_s": time.monotonic() - began}
    return answers


def silent_node(trials: Trials, nodes: Nodes) -> dict[str, object]:
    """A node that stops answering while Ray counts it as alive, and comes back."""
    with trials.runner() as runner:
        handle = trials.start(runner, OVER_TWO_NODES, ENDLESS)
        reach(runner, handle, "measure")
        node_id = node_of(runner, "mixed-0.1")
        runner._watch.turn(frozenset())  # the agents have been started by now; hear from them
        time.sleep(3.0)
        frozen = nodes.family(node_id)
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        failure = told(wait(runner, handle))
        took_s, alive = time.monotonic() - began, {node.node_id for node in runner._cluster.nodes()}
        elsewhere = trials.start(runner, OVER_TWO_NODES)
        used: set[str] = set()
        second = told(wait(runner, elsewhere, lambda: used.update(node_ids(runner))))
        for process in frozen:
            with suppress(psutil.NoSuchProcess):  # engines and actors of the trial were ended meanwhile
                process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + 30.0
        while node_id in runner._watch.lost and time.monotonic() < deadline:
            runner.warm()
            time.sleep(0.1)
        back = node_id not in runner._watch.lost
    nodes.replace(node_id)  # a node that was away for long may be dismissed by Ray at any time
    return {
        **failure,
        "took_s": took_s,
        "ray_said_alive": node_id in alive,
        "next": second,
        "next_avoided_it": bool(used) and node_id not in used,
        "came_back": back,
    }


def dead_node(trials: Trials, nodes: Nodes) -> dict[str, object]:
    """A node that is killed under load: its trial is lost, and what needs it does not fit any more."""
    with trials.runner() as runner:
        handle = trials.start(runner, OVER_TWO_NODES, ENDLESS)
        reach(runner, handle, "measure")
        nodes.kill(node_of(runner, "mixed-0.1"))
        failure = told(wait(runner, handle))
        short = replace(LIMITS, placement_s=5.0)
        large = trials.start(runner, OVER_THREE_NODES, limits=short)
        small = trials.start(runner, OVER_TWO_NODES)
        fits = told(wait(runner, small))
        return {**failure, "large": told(wait(runner, large)), "small": fits}


@contextmanager
def node_apart(address: str, hidden: Path) -> Iterator[bool]:
    """A node that `ray start` makes and that does not see `hidden`; False where this needs rights that are not had."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--mount", "true"], check=False, capture_output=True).returncode:
        yield False
        return
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--block"]
    start += [f"--num-cpus={CPUS}", f"--num-gpus={GPUS}", "--labels=gpu=apart", "--node-ip-address=127.0.2.1"]
    start += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    hide = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    command = [unshare, "--mount", "sh", "-c", hide, "sh", str(hidden), *start]
    with (hidden.parent / "apart.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield True
    finally:
        process.terminate()
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10.0)


def wait_for_pool(pool: NodePool) -> None:
    """Return when Ray counts the nodes of `pool`."""
    import ray

    deadline = time.monotonic() + WAIT_S
    while not any(node["Labels"].get("gpu") == pool.labels["gpu"] for node in ray.nodes() if node["Alive"]):
        assert time.monotonic() < deadline, f"no node of {pool.name} came"
        time.sleep(0.2)


def no_shared_folder(trials: Trials) -> dict[str, object]:
    """A node that does not see the coordinator's folders: what is measured there, and what cannot be."""
    wait_for_pool(APART)
    alone = replace(ON_ONE_NODE, pools=(replace(ON_ONE_NODE.pools[0], node_pool=APART.name),))
    prefill = Pool(role=Role.PREFILL, node_pool=POOL.name)
    split = ServingConfig(engine="emulated", pools=(prefill, replace(prefill, role=Role.DECODE, node_pool=APART.name)))
    answer = trials.once(alone)
    folder = Path(str(answer["folder"]))
    return {
        "alone": answer,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "left": [str(path) for path in Path(tempfile.gettempdir()).glob(f"tuner-*-{os.getpid()}/*-1")],
        "split": trials.once(split),
    }


def classes(trials: Trials) -> dict[str, object]:
    """Every class of failure that a single deployment can meet, through the runner."""
    faults = {
        "out_of_memory_at_boot": FaultKind.OUT_OF_MEMORY_AT_BOOT,
        "kv_cache_too_small": FaultKind.KV_CACHE_TOO_SMALL,
        "invalid_flags": FaultKind.INVALID_FLAGS,
        "transport": FaultKind.PORT_IN_USE,
        "out_of_memory_under_load": FaultKind.OUT_OF_MEMORY_UNDER_LOAD,
        "engine_crash": FaultKind.CRASH_UNDER_LOAD,
        "unhealthy_node": FaultKind.DEVICE_LOST,
        "requests_failed": FaultKind.GARBAGE,
        "startup_timeout": FaultKind.HANG_AT_BOOT,
        "measurement_timeout": FaultKind.HANG_UNDER_LOAD,
    }
    answers = {}
    for name, kind in faults.items():
        hangs = kind in {FaultKind.HANG_AT_BOOT, FaultKind.HANG_UNDER_LOAD}
        limits = replace(LIMITS, start_s=20.0, measure_s=8.0) if hangs else LIMITS
        with trials.runner(backend(Fault(kind=kind, after_requests=3))) as runner:
            answers[name] = told(wait(runner, trials.start(runner, ON_ONE_NODE, limits=limits)))
    with trials.runner() as runner:
        strict = replace(SHORT, lateness_limit_ms=0.001)
        answers["late_client"] = told(wait(runner, trials.start(runner, ON_ONE_NODE, strict)))
        handle = trials.start(runner, ON_ONE_NODE, ENDLESS)
        reach(runner, handle, "measure")
        runner.stop(handle)
        answers["lost_coordinator"] = told(wait(runner, handle))
    return answers


def secured(trials: Trials) -> dict[str, object]:
    """What listens where, who is let in, and where the key is written."""
    config = ServingConfig(
        engine="emulated", pools=(replace(OVER_TWO_NODES.pools[0], parallelism=Parallelism(), replicas=2),)
    )
    with trials.runner() as runner:
        handle = trials.start(runner, config, ENDLESS)
        reach(runner, handle, "measure")
        (deployment,) = runner._deployments
        key = deployment._site.api_key
        listening: dict[str, list[str]] = {}
        refused: dict[str, list[int]] = {}
        exposed: list[str] = []
        for name, serving in deployment._serving.items():
            process = psutil.Process(serving.pid)
            listening[name] = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            refused[name] = [
                status(f"{serving.url}{path}", None) for path in ("/v1/completions", "/metrics", "/health")
            ]
            refused[name].append(status(f"{serving.url}/metrics", key))
            exposed += [name for text in (*process.cmdline(), repr(serving.launched)) if key in text]
        hosts_of = hosts(runner)
        runner.stop(handle)
        told(wait(runner, handle))
        folder = trials.folder(handle)
        exposed += [path.name for path in folder.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
        exposed += ["site"] if key in repr(deployment._site) else []
    return {"listening": listening, "hosts": hosts_of, "statuses": refused, "exposed": exposed}


def status(url: str, key: str | None) -> int:
    """What a GET of `url` answers."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  a server of this driver's own
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310  as above
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def distrusted(trials: Trials) -> dict[str, object]:
    """The nodes on which trials run whose GPUs break, one after the other."""
    used: list[str] = []
    reasons = []
    with trials.runner(backend(Fault(kind=FaultKind.DEVICE_LOST, after_requests=1))) as runner:
        for _ in range(POOL.nodes + 1):
            handle = trials.start(runner, ON_ONE_NODE)
            reach(runner, handle, "measure")
            used.append(node_of(runner, "mixed-0"))
            reasons.append(told(wait(runner, handle))["failure"])
    return {"used": used, "reasons": reasons}


def swept(trials: Trials) -> dict[str, object]:
    """Processes of the study whose coordinators were on a host that has left the cluster, and on this one."""
    me = ProcessId.of(os.getpid())
    strays = {}
    for name, coordinator in (("gone", ProcessId(host="long-gone", pid=1, created_s=1)), ("here", me)):
        env = {**os.environ, **Tags(study=STUDY, trial=name, coordinator=coordinator).environment()}
        strays[name] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=env)
    time.sleep(0.5)  # until they are what their environments say
    try:
        with trials.runner() as runner:
            return {
                "ended": sorted({process.trial for process in runner.ended_orphans}),
                "alive": sorted(name for name, stray in strays.items() if stray.poll() is None),
            }
    finally:
        for stray in strays.values():
            stray.kill()
            stray.wait()


def unleased(trials: Trials) -> dict[str, object]:
    """A process of a trial that its coordinator does not run."""
    tags = Tags(study=STUDY, trial="nobody's", coordinator=ProcessId.of(os.getpid()))
    with trials.runner() as runner:
        handle = trials.start(runner, ON_ONE_NODE, ENDLESS)
        reach(runner, handle, "measure")
        stray = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, **tags.environment()}
        )
        deadline = time.monotonic() + 60.0
        while stray.poll() is None and time.monotonic() < deadline:
            assert isinstance(runner.poll(handle), Running)
            time.sleep(0.05)
        code = stray.poll()
        stray.kill()
        while not runner._watch.ended and time.monotonic() < deadline:
            runner.warm()
            time.sleep(0.05)
        return {
            "code": code,
            "own_still_measured": isinstance(runner.poll(handle), Running),
            "ended": sorted({process.trial for process in runner._watch.ended}),
        }


def main(folder: Path, wanted: Sequence[str]) -> None:
    """Run the `wanted` scenarios (none: all) and write the answers as JSON."""
    nodes = Nodes()
    hidden = folder / "seen"
    hidden.mkdir()
    try:
        with connect(nodes.address, [POOL], trials_at_once=2) as cluster, node_apart(nodes.address, hidden) as apart:
            trials = Trials(cluster, hidden)
            scenarios: dict[str, Callable[[], object]] = {
                "spans": lambda: spans(trials),
                "classes": lambda: classes(trials),
                "secured": lambda: secured(trials),
                "memory": lambda: memory(trials, folder),
                "distrusted": lambda: distrusted(trials),
                "swept": lambda: swept(trials),
                "unleased": lambda: unleased(trials),
                "apart": lambda: no_shared_folder(trials) if apart else None,
                "silent": lambda: silent_node(trials, nodes),
                "dead": lambda: dead_node(trials, nodes),
            }
            answers = {name: run() for name, run in scenarios.items() if not wanted or name in wanted}
    finally:
        nodes.close()
    (folder / "answers.json").write_text(json.dumps(answers, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
