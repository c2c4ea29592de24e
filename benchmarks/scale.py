"""A study of 2,000 trials on 1,000 accelerators: what the coordinator costs, and whether it keeps the nodes busy.

    python benchmarks/scale.py [--trials 2000] [--nodes 125] [--parallel 200] [--speed-up 1] [--seed 0] [--json]
        [--clock wall|cpu] [--most-minutes 60]

What is real: the study file, its space and rules, the performance model and what it learns, the screen and NSGA-II, the
SQLite storage with its lease, the loop of `tuner study run` (this process calls the same `run_study`), the placement
planned by `cluster.placement`, and a placement group of Ray for every trial, made and removed while the others run.

What is not: there is one Ray node, which declares the accelerators of each of the 125 nodes as a resource of its own
(`gpus_of_a100-017: 8`); every bundle names the node that it wants, so Ray refuses to give an accelerator twice. No
engine is started: its start-up and its measurement take seconds by formula, shortened by `--speed-up`, and the figures
are those of the uncorrected model times a random factor of each configuration and of each run. Seconds of the
coordinator are never shortened. EMULATED: no figure says anything of a GPU.

With `--clock cpu` there is no Ray either, and time passes only as the coordinator computes: its clock is the processor
time of its thread, a sleep moves it on at once, and the formulas above take none of it. That is what a machine with a
free core would show, whatever else this one does, but for waits for the disk and for placement groups.

Printed, by the number of trials that were told before: the seconds that a trial costs beside its start-up and its
measurement (proposing it, its placement group, noticing that it has ended, storing it, learning from it), and the
memory of the coordinator. Then: how busy the accelerators were while there were proposals left.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")  # before numpy: the two cores that the project's targets speak of
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks.slowed import slowed
from cluster.placement import BundleKind, Placement, plan_placement
from cluster.runner import Running, TrialHandle, TrialRequest
from perf_model.predictor import Predictor
from search_spaces.hardware import Device, DeviceKind, NodePool
from search_spaces.metrics import LATENCIES
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome
from search_spaces.problem import Problem
from search_spaces.serving import ServingConfig
from studies.history import StudyHistory
from studies.records import Proposal, TrialRecord, TrialStatus
from studies.storage import open_storage
from tuner.loop import Search
from tuner.observer import Snapshot
from tuner.places import Place, find_place
from tuner.session import run_study
from tuner.study_file import parse_study
from tuner.study_schema import StudyFile
from tuner.wiring import uncalibrated

GPU_TYPES = ("a100", "h100", "h200")
PRICES = dict(zip(GPU_TYPES, (12.0, 24.0, 32.0), strict=True))
GPUS_PER_NODE = 8
STEPS = 10
"""Rows of the table: the trials in so many parts."""
START_S, LEAST_MEASURE_S, MOST_MEASURE_S = 60.0, 30.0, 180.0
"""Seconds, before the speed-up: the median start of an engine, and the bounds of a measurement."""
CONFIG_SPREAD, RUN_SPREAD = 0.2, 0.03
"""Standard deviations of the logarithm of what a measurement differs from the model by."""
MOST_OVERHEAD_S, LEAST_BUSY, MOST_GROWTH_MIB = 0.5, 0.9, 50
"""Targets; the growth of memory is that of 1,000 trials, "flat" beside some 500 MiB."""
LOST_SHARE = 0.01
"""Share of the trials whose node is lost, and that are repeated."""
STUDY = """
name: scale
model: {{name: Llama-3.1-70B}}
workload: {{isl: {{mean: 1024, spread: 0.25}}, osl: {{mean: 128, spread: 0.25}}, concurrency: [4, 16, 64, 256]}}
slos: {{ttft_p99_ms: 4000}}
objectives: [output_tokens_per_dollar, ttft_p50_ms, tpot_p50_ms]
node_pools:
{pools}
engines:
  emulated: {{max_num_seqs: [16, 64, 256], max_num_batched_tokens: [1024, 2048, 8192], enable_chunked_prefill: true,
    enable_prefix_caching: [true, false], kv_cache_dtype: auto, gpu_memory_utilization: 0.9}}
space: {{modes: [aggregated, disaggregated], replicas: [1, 2, 3, 4], tp: [2, 4, 8], pp: [1, 2]}}
budget: {{trials: {trials}, parallel_trials: {parallel}, confirm: 1, control_every: 0}}
seed: {seed}
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    trials: int
    nodes: int
    parallel: int
    speed_up: float
    seed: int
    most_minutes: float
    clock: str


def study_text(plan: Plan) -> str:
    """The study file: the nodes shared out evenly over the GPU types."""
    pools = [
        f"  {gpu}: {{device: {gpu}_sxm, nodes: {len(range(first, plan.nodes, len(GPU_TYPES)))}, "
        f"gpus_per_node: {GPUS_PER_NODE}, price_per_hour: {PRICES[gpu]}, labels: {{gpu: {gpu}}}}}"
        for first, gpu in enumerate(GPU_TYPES)
    ]
    return STUDY.format(trials=plan.trials, parallel=plan.parallel, seed=plan.seed, pools="\n".join(pools))


# ---------------------------------------------------------------------------------------------------------- the nodes


@dataclass
class Ledger:
    """Accelerators that are free on each emulated node, by the name of its resource."""

    free: dict[str, int]

    @classmethod
    def of(cls, pools: Sequence[NodePool]) -> Ledger:
        """All nodes of `pools`, idle."""
        return cls({_resource(pool.name, n): pool.devices_per_node for pool in pools for n in range(pool.nodes)})

    def take(self, placement: Placement) -> dict[str, int] | None:
        """Accelerators for every replica, each bundle on the fullest node that has room; None where one finds none."""
        room, taken = dict(self.free), {}
        for bundle in sorted(placement.replicas, key=lambda b: -b.gpus):
            nodes = [name for name, free in room.items() if free >= bundle.gpus and name.startswith(_of(bundle))]
            if not nodes:
                return None
            chosen = min(nodes, key=room.__getitem__)
            room[chosen] -= bundle.gpus
            taken[chosen] = taken.get(chosen, 0) + bundle.gpus
        self.free = room
        return taken

    def give_back(self, taken: Mapping[str, int]) -> None:
        """Free what `take` took."""
        for name, gpus in taken.items():
            self.free[name] += gpus


def _resource(pool: str, node: int) -> str:
    return f"gpus_of_{pool}-{node:03d}"


def _of(bundle: Any) -> str:
    return f"gpus_of_{bundle.node_pool}-"


@contextmanager
def one_ray_node(pools: Sequence[NodePool]) -> Iterator[None]:
    """Ray on this machine, with a resource for the accelerators of every emulated node."""
    import ray

    resources = {_resource(pool.name, n): float(pool.devices_per_node) for pool in pools for n in range(pool.nodes)}
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=sum(pool.devices for pool in pools) * 2,  # no process uses them: bundles ask for them as they would
        resources=resources,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()


# ----------------------------------------------------------------------------------------------------------- the clocks


class WallClock:
    """Seconds as they pass."""

    def __call__(self) -> float:
        """The time by the machine's clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


@dataclass
class CpuClock:
    """Processor time of this thread, and what it has slept, which takes no time at all."""

    slept_s: float = 0.0

    def __call__(self) -> float:
        """The time by this clock."""
        return time.thread_time() + self.slept_s

    def sleep(self, seconds: float) -> None:
        """Move on."""
        self.slept_s += seconds

    def free(self, seconds: float) -> None:
        """Forget seconds of the processor that are none of the coordinator's."""
        self.slept_s -= seconds


Clock = WallClock | CpuClock


class RayGroups:
    """Placement groups of Ray.

    One that is asked for right after another was removed is refused once, and tried again by Ray a second later; a
    tenth of a second later it is there at once.
    """

    settle_s = 0.1

    def make(self, bundles: list[dict[str, float]]) -> Any:
        """Ask for a group."""
        from ray.util import placement_group

        return placement_group(bundles, strategy="PACK")

    def is_ready(self, group: Any) -> bool:
        """True once Ray has placed it."""
        return bool(group.wait(0))

    def remove(self, group: Any) -> None:
        """Give it back."""
        from ray.util import remove_placement_group

        remove_placement_group(group)


class NoGroups:
    """Groups that are there at once: without Ray."""

    settle_s = 0.0

    def make(self, bundles: list[dict[str, float]]) -> Any:
        """What stands for a group."""
        return bundles

    def is_ready(self, _group: Any) -> bool:
        """It is."""
        return True

    def remove(self, _group: Any) -> None:
        """Nothing is there."""


# --------------------------------------------------------------------------------------------------------- the engines


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What an engine would show: the uncorrected model, times a factor of its configuration and one of the run."""

    model: Predictor
    problem: Problem
    requests: int
    seed: int

    def outcome(self, request: TrialRequest) -> Outcome:
        """The outcome of a trial; the same whenever it is asked for."""
        rng = random.Random(f"{self.seed}:{request.trial}")
        if rng.random() < LOST_SHARE:
            return Failure(reason=FailureReason.LOST_NODE, detail="emulated: the node left the cluster")
        (prediction,) = self.model.predict([request.candidate])
        if prediction.infeasible is not None:
            return Failure(reason=FailureReason.OUT_OF_MEMORY_AT_BOOT, detail=f"emulated: {prediction.infeasible}")
        by_config = random.Random(f"{self.seed}:{request.candidate.config.key}")
        factor = math.exp(by_config.gauss(0.0, CONFIG_SPREAD) + rng.gauss(0.0, RUN_SPREAD))
        factors = dict.fromkeys(LATENCIES, factor)
        config = request.candidate.config
        metrics = slowed(prediction.metrics, factors, requests=self.requests, devices=config.devices)
        timings = {"start": self.start_s(config), "measure": self.measure_s(metrics.duration_s)}
        return Measurement(metrics=metrics, client_lateness_ms=0.0, timings_s=timings, emulated=True)

    def start_s(self, config: ServingConfig) -> float:
        """Seconds until the replicas are ready."""
        return START_S * math.exp(random.Random(f"start:{config.key}").gauss(0.0, 0.3))

    def measure_s(self, duration_s: float) -> float:
        """Seconds of warm-up and measurement."""
        return min(MOST_MEASURE_S, max(LEAST_MEASURE_S, 1.2 * duration_s))


@dataclass(kw_only=True)
class Trial:
    """A trial in flight; times are those of the wall clock, `ready_s` once Ray has its placement group."""

    request: TrialRequest
    outcome: Outcome
    seconds: float
    began_s: float
    taken: dict[str, int] = field(default_factory=dict)
    group: Any = None
    fits_s: float | None = None
    ready_s: float | None = None

    @property
    def phase(self) -> str:
        """As `cluster.runner.Running` has it."""
        return "placement" if self.ready_s is None else "measure"

    @property
    def ends_s(self) -> float:
        """When its start-up and its measurement are over."""
        return math.inf if self.ready_s is None else self.ready_s + self.seconds


class EmulatedRunner:
    """See `cluster.runner.TrialRunner`: real placement groups, engines by formula."""

    def __init__(self, truth: Truth, pools: Sequence[NodePool], plan: Plan, meter: Meter) -> None:
        self._truth, self._plan, self._meter, self._clock = truth, plan, meter, meter.clock
        self._groups = RayGroups() if plan.clock == "wall" else NoGroups()
        self._ledger = Ledger.of(pools)
        self._trials: dict[str, Trial] = {}
        self._freed: list[tuple[float, dict[str, int]]] = []

    def start(self, request: TrialRequest) -> TrialHandle:
        """Queue the trial; it begins when its accelerators are free."""
        self._meter.asked()
        with self._meter.emulating():
            outcome = self._truth.outcome(request)
            seconds = sum(outcome.timings_s.values()) or self._truth.start_s(request.candidate.config)
        trial = Trial(request=request, outcome=outcome, seconds=seconds / self._plan.speed_up, began_s=self._clock())
        self._trials[request.trial] = trial
        self._place(trial, self._clock())
        return TrialHandle(trial=request.trial, config_key=request.candidate.config.key)

    def _place(self, trial: Trial, freed_s: float) -> None:
        placement = plan_placement(trial.request.candidate.config, trial.request.problem)
        taken = self._ledger.take(placement)
        if taken is None:
            return
        trial.taken, trial.fits_s = taken, freed_s
        bundles = [{name: float(gpus), "CPU": float(gpus)} for name, gpus in taken.items()]
        bundles += [b.resources for b in placement.bundles if b.kind is not BundleKind.REPLICA]
        trial.group = self._groups.make(bundles)

    def poll(self, handle: TrialHandle) -> Running | Outcome:
        """The outcome once its time is over; devices go to those that wait."""
        self._settle()
        trial = self._trials[handle.trial]
        now_s = self._clock()
        if trial.group is not None and trial.ready_s is None and self._groups.is_ready(trial.group):
            trial.ready_s = self._clock()
        if now_s < trial.ends_s:
            return Running(phase=trial.phase, elapsed_s=now_s - trial.began_s)
        self._remove(handle.trial)
        self._meter.over(trial)
        self._settle()
        return trial.outcome

    def _settle(self) -> None:
        """Give free devices to those that wait, once their groups are gone."""
        while self._freed and self._clock() >= self._freed[0][0] + self._groups.settle_s:
            freed_s, taken = self._freed.pop(0)
            self._ledger.give_back(taken)
            for waiting in self._trials.values():
                if waiting.group is None:
                    self._place(waiting, freed_s)

    def _remove(self, name: str) -> None:
        trial = self._trials.pop(name)
        if trial.group is not None:
            self._groups.remove(trial.group)
            self._freed.append((self._clock(), trial.taken))

    def stop(self, handle: TrialHandle) -> None:
        """Forget the trial."""
        if handle.trial in self._trials:
            self._remove(handle.trial)

    def warm(self) -> tuple[ServingConfig, ...]:
        """Nothing stays up: every trial pays its start."""
        self._meter.asks()
        return ()

    def release(self) -> None:
        """There is nothing to release."""

    def close(self) -> None:
        """Remove what is left."""
        for name in tuple(self._trials):
            self._remove(name)


@dataclass(frozen=True, kw_only=True)
class EmulatedNodes:
    """See `tuner.access.Cluster`."""

    emulated: EmulatedRunner
    trials_at_once: int

    def measure(self, pool: NodePool) -> Device:
        """There are no CPU pools."""
        raise AssertionError(f"pool {pool.name} is of {DeviceKind.GPU}s: nothing is to be measured")

    def runner(self, _study: str) -> EmulatedRunner:
        """The runner."""
        return self.emulated


# ------------------------------------------------------------------------------------------------------------ the meter


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds that one trial cost beside its start-up and its measurement.

    `ask_s` from before it was proposed (with those that were chosen together with it) to when it was handed to the
    runner, `begin_s` until the loop went on, `place_s` from free devices to a placement group, `notice_s` from its end
    to the poll that saw it, `tell_s` for storing it, `learn_s` its share of what was learned after. `cpu_s` is the
    processor time of the loop's thread in all this, whatever else the machine did, shared out over the trials that it
    was spent for; thinking ahead while trials run is not in it. `emulation_s` was spent on the formulas of this
    benchmark, which take the place of engines: it is in none of the others.
    """

    ask_s: float
    begin_s: float
    place_s: float
    notice_s: float
    tell_s: float
    learn_s: float
    cpu_s: float
    emulation_s: float

    @property
    def total_s(self) -> float:
        """The sum of what passed on the wall clock for the coordinator's own work."""
        return sum(asdict(self).values()) - self.cpu_s - self.emulation_s


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """What a trial cost until it was handed over; see `Cost`."""

    ask_s: float
    begin_s: float
    emulation_s: float
    cpu_s: float


class Meter:
    """Looks at the clock whenever the loop calls the runner or the observer; an observer and more."""

    def __init__(self, say: TextIO, clock: Clock) -> None:
        self.clock = self._clock = clock
        self.costs: list[Cost] = []
        self.rss_bytes: list[int] = []
        self.worked_device_s = self.reserved_device_s = 0.0
        self.notes: list[str] = []
        self.loads = [os.getloadavg()[0]]
        self._process = psutil.Process()
        self._say = say
        self._asks_s = self._asked_s = self._ask_s = 0.0
        self._asks_cpu_s = self._tell_cpu_s = self._ended_cpu_s = 0.0
        self._emulated_s = self._emulated_cpu_s = 0.0
        self._batch: list[int] = []
        self._batch_cpu_s = 0.0
        self._ask: dict[int, _Begun] = {}
        self._over: list[tuple[float, Trial]] = []
        self._open: list[Cost] = []
        self._ended_s = 0.0

    def asks(self) -> None:
        """The loop is about to ask for proposals."""
        self._share_out()
        self._asks_s, self._asks_cpu_s = self._clock(), time.thread_time()
        self._batch, self._emulated_cpu_s = [], 0.0

    def asked(self) -> None:
        """The loop has a proposal, and hands it over."""
        self._asked_s = self._clock()
        self._ask_s = self._asked_s - self._asks_s
        self._emulated_s = 0.0

    @contextmanager
    def emulating(self) -> Iterator[None]:
        """Inside the block a formula takes the place of an engine."""
        began_s, began_cpu_s = self._clock(), time.thread_time()
        yield
        spent_s = time.thread_time() - began_cpu_s
        self._emulated_cpu_s += spent_s
        self._emulated_s += self._clock() - began_s
        if isinstance(self._clock, CpuClock):
            self._clock.free(spent_s)
            self._emulated_s = 0.0

    def _share_out(self) -> None:
        """The processor time of what was asked for together, in equal parts."""
        for number in self._batch:
            if number in self._ask:
                self._ask[number] = replace(self._ask[number], cpu_s=self._batch_cpu_s / len(self._batch))

    def over(self, trial: Trial) -> None:
        """The runner gives out the outcome of `trial`."""
        self._over.append((self._clock(), trial))
        devices = trial.request.candidate.config.devices
        self.worked_device_s += devices * trial.seconds
        self.reserved_device_s += devices * (self._clock() - (trial.fits_s or 0.0))
        self._tell_cpu_s = time.thread_time()

    def note(self, text: str) -> None:
        """As `tuner.observer.Observer`."""
        self.notes.append(text)

    def begun(self, proposal: Proposal) -> None:
        """As `tuner.observer.Observer`."""
        self._batch.append(proposal.trial_number)
        self._batch_cpu_s = time.thread_time() - self._asks_cpu_s - self._emulated_cpu_s
        self._ask[proposal.trial_number] = _Begun(
            ask_s=self._ask_s,
            begin_s=self._clock() - self._asked_s - self._emulated_s,
            emulation_s=self._emulated_s,
            cpu_s=0.0,
        )

    def ended(self, record: TrialRecord, _problem: Problem) -> None:
        """As `tuner.observer.Observer`."""
        self._ended_s, self._ended_cpu_s = self._clock(), time.thread_time()
        seen_s, trial = self._over.pop(0)
        self._share_out()
        begun = self._ask.pop(record.number)
        cost = Cost(
            ask_s=begun.ask_s,
            begin_s=begun.begin_s,
            place_s=(trial.ready_s or 0.0) - (trial.fits_s or 0.0),
            notice_s=seen_s - trial.ends_s,
            tell_s=self._ended_s - seen_s,
            learn_s=0.0,
            cpu_s=begun.cpu_s + self._ended_cpu_s - self._tell_cpu_s,
            emulation_s=begun.emulation_s,
        )
        self._open.append(cost)

    def now(self, snapshot: Snapshot) -> None:
        """As `tuner.observer.Observer`: called once in a turn of the loop, after what was learned."""
        learn_s = (self._clock() - self._ended_s) / max(1, len(self._open))
        learn_cpu_s = (time.thread_time() - self._ended_cpu_s) / max(1, len(self._open))
        for cost in self._open:
            self.costs.append(replace(cost, learn_s=learn_s, cpu_s=cost.cpu_s + learn_cpu_s))
            self.rss_bytes.append(self._process.memory_info().rss)
            if len(self.costs) % 50 == 0:
                self._report(snapshot)
        self._open = []

    def _report(self, snapshot: Snapshot) -> None:
        parts = dict.fromkeys(asdict(self.costs[-1]), 0.0)
        for cost in self.costs[-50:]:
            for key, value in asdict(cost).items():
                parts[key] += value / 50
        said = ", ".join(f"{key.removesuffix('_s')} {1000 * value:.0f}" for key, value in parts.items())
        rss = self.rss_bytes[-1] / 2**20
        held = sum(t.proposal.candidate.config.devices for t in snapshot.trying if t.phase != "placement")
        self.loads.append(os.getloadavg()[0])
        print(
            f"{len(self.costs)} told, {len(snapshot.trying)} in flight, {held} accelerators held, {rss:.0f} MiB; "
            f"mean ms of the last 50: {said}",
            file=self._say,
            flush=True,
        )


# ----------------------------------------------------------------------------------------------------------- the answer


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over the trials that were told from number `first` to `last`; memory at the end of them."""

    first: int
    last: int
    overhead_s: float
    p95_s: float
    ask_s: float
    begin_s: float
    place_s: float
    tell_s: float
    learn_s: float
    notice_s: float
    cpu_s: float
    emulation_s: float
    rss_mib: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was measured.

    `busy_share` is the share of all accelerators that held a trial while proposals remained, `reserved_busy_share` the
    share of that time in which they started or measured one, and did not wait for the coordinator.
    """

    plan: Plan
    wall_s: float
    finished: int
    lost: int
    rows: tuple[Row, ...]
    overhead_median_s: float
    overhead_mean_s: float
    cpu_median_s: float
    cpu_of_all_s: float
    growth: float
    cpu_growth: float
    rss_growth_mib_per_1000: float
    busy: str
    busy_share: float
    reserved_busy_share: float
    load_average: float

    @property
    def targets(self) -> dict[str, bool]:
        """What is asked for, and whether it was met."""
        return {
            f"{self.plan.trials} trials finished": self.finished == self.plan.trials,
            f"overhead of a trial below {MOST_OVERHEAD_S} s at the median": self.overhead_median_s < MOST_OVERHEAD_S,
            f"accelerators held {LEAST_BUSY:.0%} of the time": self.busy_share >= LEAST_BUSY,
            f"memory grows by at most {MOST_GROWTH_MIB} MiB per 1,000 trials": self.rss_growth_mib_per_1000
            <= MOST_GROWTH_MIB,
        }

    @property
    def passed(self) -> bool:
        """True where every target was met."""
        return all(self.targets.values())


def rows_of(meter: Meter) -> tuple[Row, ...]:
    """The costs in `STEPS` parts."""
    size = max(1, len(meter.costs) // STEPS)
    rows = []
    for first in range(0, len(meter.costs) - size + 1, size):
        part = meter.costs[first : first + size]
        totals = sorted(cost.total_s for cost in part)

        def middle(name: str, part: list[Cost] = part) -> float:
            return statistics.median(getattr(cost, name) for cost in part)

        rows.append(
            Row(
                first=first,
                last=first + size - 1,
                overhead_s=statistics.median(totals),
                p95_s=totals[int(0.95 * (len(totals) - 1))],
                ask_s=middle("ask_s"),
                begin_s=middle("begin_s"),
                place_s=middle("place_s"),
                tell_s=middle("tell_s"),
                learn_s=middle("learn_s"),
                notice_s=middle("notice_s"),
                cpu_s=middle("cpu_s"),
                emulation_s=middle("emulation_s"),
                rss_mib=meter.rss_bytes[first + size - 1] / 2**20,
            )
        )
    return tuple(rows)


def measure(plan: Plan, folder: Path, say: TextIO) -> Answer:
    """Run the study and judge it."""
    clock: Clock = WallClock() if plan.clock == "wall" else CpuClock()
    meter = Meter(say, clock)
    file: StudyFile = parse_study(study_text(plan), name="scale")
    place = find_place(f"sqlite:///{folder / 'studies.db'}")
    began_s = time.monotonic()

    @contextmanager
    def reach(problem: Problem, _place: Place) -> Iterator[EmulatedNodes]:
        with one_ray_node(problem.node_pools) if plan.clock == "wall" else nullcontext():
            truth = Truth(
                model=uncalibrated(problem, file), problem=problem, requests=file.measurement.requests, seed=plan.seed
            )
            runner = EmulatedRunner(truth, problem.node_pools, plan, meter)
            yield EmulatedNodes(emulated=runner, trials_at_once=plan.parallel)

    @contextmanager
    def in_time() -> Iterator[Any]:
        yield lambda: time.monotonic() - began_s > 60 * plan.most_minutes

    with patch("tuner.session.Search", partial(Search, clock=clock, sleep=clock.sleep)):
        run_study(file, place, connect=reach, stop=in_time(), observer=meter)
    return _answer(plan, meter, StudyHistory(open_storage(place.url), "scale"), time.monotonic() - began_s)


def _answer(plan: Plan, meter: Meter, history: StudyHistory, wall_s: float) -> Answer:
    rows = rows_of(meter)
    trials = history.trials()
    totals = [cost.total_s for cost in meter.costs]
    return Answer(
        plan=plan,
        wall_s=wall_s,
        finished=sum(trial.is_finished for trial in trials),
        lost=sum(trial.status is TrialStatus.LOST for trial in trials),
        rows=rows,
        overhead_median_s=statistics.median(totals),
        overhead_mean_s=statistics.fmean(totals),
        cpu_median_s=statistics.median(cost.cpu_s for cost in meter.costs),
        cpu_of_all_s=time.process_time() / max(1, len(totals)),
        cpu_growth=rows[-1].cpu_s / rows[0].cpu_s,
        growth=rows[-1].overhead_s / rows[0].overhead_s,
        rss_growth_mib_per_1000=1000 * (rows[-1].rss_mib - rows[0].rss_mib) / (rows[-1].last - rows[0].last),
        busy=next((note for note in meter.notes if "device-seconds" in note), "not told"),
        busy_share=history.device_use.share,
        reserved_busy_share=meter.worked_device_s / meter.reserved_device_s,
        load_average=statistics.fmean(meter.loads),
    )


def print_table(answer: Answer, out: TextIO) -> None:
    """The rows, then the totals."""
    names = ("overhead", "p95", "ask", "begin", "place", "notice", "tell", "learn", "cpu", "emulation")
    print(f"{'trials':>12}" + "".join(f"{name:>10}" for name in (*names, "memory")) + "   (median ms; MiB)", file=out)
    for row in answer.rows:
        figures = "".join(f"{1000 * getattr(row, f'{name}_s'):>10.0f}" for name in names)
        print(f"{row.first:>6}-{row.last:<5}{figures}{row.rss_mib:>10.0f}", file=out)
    print(f"{answer.finished} of {answer.plan.trials} trials finished, {answer.lost} lost and repeated", file=out)
    print(
        f"overhead of a trial: median {answer.overhead_median_s:.3f} s, mean {answer.overhead_mean_s:.3f} s", file=out
    )
    print(f"processor time of the loop for it: median {answer.cpu_median_s:.3f} s; ", end="", file=out)
    print(f"of the whole coordinator, thinking ahead included: {answer.cpu_of_all_s:.2f} s per trial", file=out)
    grown = f"x {answer.growth:.2f} (processor time x {answer.cpu_growth:.2f})"
    print(f"growth of the median from the first tenth to the last: {grown}", file=out)
    print(f"memory grows by {answer.rss_growth_mib_per_1000:.0f} MiB per 1,000 trials", file=out)
    print(f"{answer.busy}; {answer.reserved_busy_share:.1%} of what they held, they worked", file=out)
    print(f"wall time {answer.wall_s:.0f} s, clock: {answer.plan.clock}", file=out)
    print(f"load average of the machine meanwhile: {answer.load_average:.1f} on {os.cpu_count()} cores", file=out)
    for target, met in answer.targets.items():
        print(f"{'met   ' if met else 'MISSED'} {target}", file=out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=125)
    parser.add_argument("--parallel", type=int, default=200, help="trials at once; more than fit, so that some wait")
    parser.add_argument("--speed-up", type=float, default=1.0, help="of start-up and measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-minutes", type=float, default=1440.0, help="stop then, with what was told so far")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: see above")
    parser.add_argument("--keep", type=Path, help="folder for the storage; a temporary one by default")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Parse, run, print; 0 where everything held."""
    options = parse_options()
    plan = Plan(**{key: getattr(options, key) for key in Plan.__dataclass_fields__})
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="scale-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        answer = measure(plan, folder, sys.stderr)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps({**asdict(answer), "targets": answer.targets}, indent=1))
    print_table(answer, sys.stderr if options.json else sys.stdout)
    return 0 if answer.passed else 1


if __name__ == "__main__":
    sys.exit(main())
