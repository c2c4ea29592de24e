"""Nothing is lost when it breaks: a study whose driver, actors, engines and nodes are killed at random moments.

    python benchmarks/chaos.py [--trials 200] [--kills 20] [--nodes 6] [--seed 0] [--calm-runs 1] [--json]

A study of the emulated engine runs on a Ray cluster of 6 nodes (`chaos_nodes.py`, a process of its own) through the
real command. Kills are spread over the trials by the seed, each kind as often as the others: the driver (`tuner study
run`), the process of an actor, the process of an engine or router, and the raylet of a node, all with SIGKILL. A killed
driver is followed by `tuner study resume`, a killed node by a new one. What the storage and the process table say then
is compared with an undisturbed run of the same study. EMULATED: its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TextIO

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.chaos_nodes import GPU_TYPES, GPUS_PER_NODE
from cluster.janitor import tagged_processes
from studies import pareto
from studies.errors import StudyFormatError, StudyNotFoundError
from studies.history import StudyHistory
from studies.records import TrialRecord, TrialStatus
from studies.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("driver", "actor", "engine", "node")
ACTORS = ("ProcessActor", "LoadActor")
TARGET_LIMIT_S = 60.0
"""A kill waits this long for something of its kind to kill."""
GONE_LIMIT_S = 15.0
NEWEST = 3
"""Actors and engines are killed among so many of the newest: the older ones mostly stand idle."""
POLL_S = 0.25
NOISE = 0.1
"""Relative difference of hypervolume that counts as noise: the order of parallel results is not repeatable."""
SECONDS_PER_TRIAL, SECONDS_PER_KILL, START_S = 30.0, 60.0, 120.0
"""Limits, many times what is usual: whatever takes longer hangs."""
STUDY = """
name: {name}
model: {{name: {model}}}
workload: {{isl: {{mean: 64, spread: 0.25}}, osl: {{mean: 8, spread: 0.25}}, concurrency: [1, 2, 4, 8]}}
objectives: [output_tokens_per_dollar, tpot_p50_ms]
node_pools:
{pools}
engines:
  emulated: {{max_num_seqs: [4, 16, 64], max_num_batched_tokens: [256, 1024], enable_chunked_prefill: true,
    enable_prefix_caching: [true, false], kv_cache_dtype: auto, gpu_memory_utilization: 0.9}}
space: {{modes: [aggregated, disaggregated], replicas: 1, tp: [1, 2, 4]}}
emulation: {{nodes: false}}
budget: {{trials: {trials}, parallel_trials: {parallel}, confirm: 1, control_every: 0}}
measurement: {{requests: 8, lateness_limit_ms: 10000}}
limits: {{placement_s: 60, start_s: 60, measure_s: 60, stop_s: 10}}
seed: {seed}
"""


class ChaosError(RuntimeError):
    """The study did not come to its end."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run: `trials` in all, `parallel` at once, on `nodes` nodes, with `kills` faults."""

    trials: int
    kills: int
    nodes: int
    parallel: int
    seed: int
    model: str

    @property
    def limit_s(self) -> float:
        """The longest that the study may take."""
        return START_S + SECONDS_PER_TRIAL * self.trials / self.parallel + SECONDS_PER_KILL * self.kills


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A fault of `kind`, `delay_s` after `finished` trials are finished."""

    kind: str
    finished: int
    delay_s: float


@dataclass(kw_only=True)
class Happened:
    """What became of the kills: how often each kind was killed, and how often the driver ended by itself."""

    killed: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    driver_errors: int = 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the storage and the process table say of a study that has ended."""

    finished: int
    failed: int
    repeated: int
    lost_for_good: int
    measured_twice: int
    running: int
    waiting: int
    orphans: int
    wall_s: float
    front: int

    def is_sound(self, trials: int) -> bool:
        """True where exactly `trials` are finished, each once, and nothing else is left."""
        left = (self.lost_for_good, self.measured_twice, self.running, self.waiting, self.orphans)
        return self.finished == trials and not any(left)


def planned_kills(plan: Plan) -> list[Kill]:
    """Kills in the order of their moments: each kind as often as the others, over nearly all trials."""
    rng = random.Random(plan.seed)
    kinds = [KINDS[n % len(KINDS)] for n in range(plan.kills)]
    rng.shuffle(kinds)
    moments = sorted(rng.randrange(max(1, plan.trials - plan.parallel)) for _ in kinds)
    return [Kill(kind=k, finished=m, delay_s=rng.uniform(0.0, 3.0)) for k, m in zip(kinds, moments, strict=True)]


@dataclass
class Nodes:
    """The process that keeps the Ray nodes."""

    process: subprocess.Popen[str]
    count: int
    address: str = ""

    def answer(self) -> dict[str, object]:
        """The next line that it prints."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise ChaosError("the process that keeps the nodes has ended; its messages are in nodes.log")
        told: dict[str, object] = json.loads(line)
        return told

    def replace(self, number: int) -> None:
        """Kill a node and put another in its place."""
        if self.process.stdin:
            self.process.stdin.write(f"kill {number}\n")
            self.process.stdin.flush()
        self.answer()


@contextmanager
def ray_nodes(plan: Plan, log: Path) -> Iterator[Nodes]:
    """A cluster that outlives drivers; it ends with the block."""
    command = [sys.executable, str(ROOT / "benchmarks/chaos_nodes.py"), str(plan.nodes), str(plan.parallel)]
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            process_group=0,
        )
        nodes = Nodes(process, plan.nodes)
        try:
            nodes.address = str(nodes.answer()["address"])
            yield nodes
        finally:
            if process.stdin:
                process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


class Campaign:
    """One study with its faults. `say` gets a line for each thing that happens."""

    def __init__(self, plan: Plan, name: str, folder: Path, nodes: Nodes, say: Callable[[str], None]) -> None:
        self._plan, self._name, self._folder, self._nodes, self._say = plan, name, folder, nodes, say
        self._rng = random.Random(plan.seed + 1)
        self.happened = Happened()
        self._history: StudyHistory | None = None
        self._file = folder / f"{name}.yaml"
        self._file.write_text(study_text(plan, name))
        self._database = folder / name / "studies.db"  # its own: studies of one storage learn from each other
        self._database.parent.mkdir()
        self._storage = f"sqlite:///{self._database}"
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self, kills: Sequence[Kill]) -> Verdict:
        """Run the study to its end, with `kills`; raises `ChaosError` where it does not come to one."""
        began = time.monotonic()
        waiting = list(kills)
        with (self._folder / f"{self._name}.log").open("wb") as log:
            try:
                while self._goes_on(log):
                    if time.monotonic() - began > self._plan.limit_s:
                        raise ChaosError(f"{self._name} takes longer than {self._plan.limit_s:.0f} s; see {log.name}")
                    due = bool(waiting) and self._finished() >= waiting[0].finished
                    if due and self._driver is not None and self._strike(waiting[0]):
                        waiting.pop(0)
                    time.sleep(POLL_S)
            finally:
                self._end_driver()
        for kill in waiting:
            _count(self.happened.missed, kill.kind)
        return self._verdict(time.monotonic() - began)

    def _goes_on(self, log: object) -> bool:
        """Start or follow the driver; False when the study is complete."""
        if self._driver is None:
            self._driver = self._start(log)
        code = self._driver.poll()
        if code is None:
            return True
        self._driver = None
        if code == 0:
            return self._finished() < self._plan.trials
        if code != -9:
            self.happened.driver_errors += 1
            self._say(f"the driver ended by itself with code {code}")
            if self.happened.driver_errors > max(3, self._plan.kills):
                raise ChaosError(f"the driver of {self._name} fails again and again; see its log in {self._folder}")
        return True

    def _start(self, log: object) -> subprocess.Popen[bytes]:
        begun = self.read() is not None
        what = ["resume", self._name] if begun else ["run", str(self._file)]
        command = [sys.executable, "-m", "tuner.cli", "study", *what, "--address", self._nodes.address, "--no-progress"]
        command += ["--storage", self._storage]
        return subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=subprocess.STDOUT, process_group=0)  # type: ignore[call-overload, no-any-return]  # an open file

    def _end_driver(self) -> None:
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
            self._driver.wait(10)

    # reading

    def read(self) -> StudyHistory | None:
        """The study in its storage, None where it is not there yet."""
        if self._history is None and self._database.exists():
            try:
                self._history = StudyHistory(open_storage(self._storage), self._name)
            except (StudyNotFoundError, StudyFormatError):  # being made
                return None
        return self._history

    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials as stored."""
        history = self.read()
        return () if history is None else history.trials()

    def _finished(self) -> int:
        return sum(trial.is_finished for trial in self.trials())

    # killing

    def _strike(self, kill: Kill) -> bool:
        """Kill something; False where the driver ended meanwhile, so that it is to be tried again."""
        time.sleep(kill.delay_s)
        deadline = time.monotonic() + TARGET_LIMIT_S
        while time.monotonic() < deadline:
            if self._driver is None or self._driver.poll() is not None:
                return False
            struck = self._try(kill.kind)
            if struck is not None:
                _count(self.happened.killed, kill.kind)
                self._say(f"{self._finished()} trials finished: killed {kill.kind} {struck}")
                return True
            time.sleep(0.05)
        _count(self.happened.missed, kill.kind)
        self._say(f"there was no {kill.kind} to kill within {TARGET_LIMIT_S:g} s")
        return True

    def _try(self, kind: str) -> str | None:
        """Kill one of `kind`, and say which; None where there is none now."""
        match kind:
            case "driver":
                return self._kill_driver()
            case "node":
                number = self._rng.randrange(self._plan.nodes)
                self._nodes.replace(number)
                return f"{number} ({GPU_TYPES[number % len(GPU_TYPES)]})"
            case "actor":
                found = self._actors()
            case _:
                found = sorted(process.pid for process in tagged_processes(self._name) if _is_started(process.pid))
        return _kill(self._rng.choice(found[-NEWEST:])) if found else None

    def _kill_driver(self) -> str | None:
        if self._driver is None:
            return None
        self._driver.kill()
        self._driver.wait(10)
        return str(self._driver.pid)

    def _actors(self) -> list[int]:
        children = psutil.Process(self._nodes.process.pid).children(recursive=True)
        return sorted(child.pid for child in children if any(name in _title(child) for name in ACTORS))

    # judging

    def _verdict(self, wall_s: float) -> Verdict:
        trials = self.trials()
        repeated = {trial.retry_of for trial in trials}
        lost = [trial for trial in trials if trial.status is TrialStatus.LOST]
        keys = Counter(trial.key for trial in trials if trial.is_finished)
        history = self.read()
        return Verdict(
            finished=sum(trial.is_finished for trial in trials),
            failed=sum(trial.status is TrialStatus.FAILED for trial in trials),
            repeated=sum(trial.number in repeated for trial in lost),
            lost_for_good=sum(trial.number not in repeated for trial in lost if trial.key is not None),
            measured_twice=sum(count > 1 for count in keys.values()),
            running=sum(trial.status is TrialStatus.RUNNING for trial in trials),
            waiting=sum(trial.status is TrialStatus.WAITING for trial in trials),
            orphans=len(left_behind(self._name)),
            wall_s=wall_s,
            front=len(pareto.front(trials, history.directions)) if history else 0,
        )


def study_text(plan: Plan, name: str) -> str:
    """The study file: one node pool for each GPU type."""
    prices = dict(zip(GPU_TYPES, (16.0, 12.0, 6.0), strict=True))
    pools = [
        f"  {gpu}: {{device: {gpu}_sxm, nodes: {len(range(first, plan.nodes, len(GPU_TYPES)))}, "
        f"gpus_per_node: {GPUS_PER_NODE}, price_per_hour: {prices[gpu]}, labels: {{gpu: {gpu}}}}}"
        for first, gpu in enumerate(GPU_TYPES)
    ]
    return STUDY.format(
        name=name,
        trials=plan.trials,
        parallel=plan.parallel,
        seed=plan.seed,
        model=plan.model,
        pools="\n".join(pools),
    )


def left_behind(study: str) -> list[int]:
    """Processes of `study` that still run some seconds after its end."""
    deadline = time.monotonic() + GONE_LIMIT_S
    while (left := [process.pid for process in tagged_processes(study)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _is_started(pid: int) -> bool:
    """True for an engine or router, and not for the launcher that becomes it a moment later."""
    try:
        return "launch.py" not in _title(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def _count(counts: dict[str, int], kind: str) -> None:
    counts[kind] = counts.get(kind, 0) + 1


def _kill(pid: int) -> str | None:
    try:
        psutil.Process(pid).kill()
    except psutil.NoSuchProcess:
        return None
    return str(pid)


def front_ratio(disturbed: Campaign, calm: Campaign) -> float:
    """Hypervolume of the disturbed study over that of the calm one, against one reference for both."""
    history = disturbed.read()
    if history is None:
        return float("nan")
    both = [t for t in (*disturbed.trials(), *calm.trials()) if t.status is TrialStatus.MEASURED]
    reference = pareto.reference_point(pareto.points_of(both), history.directions)
    volumes = [
        pareto.hypervolume_history(campaign.trials(), history.directions, reference)[-1].hypervolume
        for campaign in (disturbed, calm)
    ]
    return volumes[0] / volumes[1] if volumes[1] > 0 else float("nan")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Both studies, judged; `passed` says whether everything that is promised held."""

    passed: bool
    plan: Plan
    happened: Happened
    disturbed: Verdict
    undisturbed: tuple[Verdict, ...]
    hypervolume_ratios: tuple[float, ...]
    noise_ratios: tuple[float, ...]


def measure(plan: Plan, folder: Path, say: Callable[[str], None], *, calm_runs: int) -> Answer:
    """Run the study with its faults, and `calm_runs` times without.

    `hypervolume_ratios` are those of the disturbed study over each undisturbed one, `noise_ratios` those of each
    further undisturbed study over the first: what chance alone does.
    """
    with ray_nodes(plan, folder / "nodes.log") as nodes:
        name = f"chaos-{plan.seed}-{folder.name}"
        disturbed = Campaign(plan, name, folder, nodes, say)
        verdict = disturbed.run(planned_kills(plan))
        calm, calm_verdicts = [], []
        for number in range(calm_runs):
            say(f"the same study, undisturbed ({number + 1} of {calm_runs})")
            calm.append(Campaign(plan, f"{name}-calm{number}", folder, nodes, say))
            calm_verdicts.append(calm[-1].run(()))
        ratios = tuple(front_ratio(disturbed, other) for other in calm)
        noise = tuple(front_ratio(other, calm[0]) for other in calm[1:])
    happened = disturbed.happened
    sound = all(found.is_sound(plan.trials) for found in (verdict, *calm_verdicts))
    alike = not ratios or abs(median(ratios) - 1) <= NOISE
    return Answer(
        passed=sound and alike and not happened.missed,
        plan=plan,
        happened=happened,
        disturbed=verdict,
        undisturbed=tuple(calm_verdicts),
        hypervolume_ratios=ratios,
        noise_ratios=noise,
    )


def print_table(answer: Answer, out: TextIO) -> None:
    """The figures, one line each."""
    calm = asdict(answer.undisturbed[0]) if answer.undisturbed else {}
    print(f"{'':16}{'disturbed':>12}{'undisturbed':>14}", file=out)
    for key, value in asdict(answer.disturbed).items():
        beside = f"{calm[key]:>14.5g}" if calm else ""
        print(f"{key:16}{value:>12.5g}{beside}", file=out)
    print(f"killed: {answer.happened.killed}, missed: {answer.happened.missed}", file=out)
    print(f"drivers that ended by themselves: {answer.happened.driver_errors}", file=out)
    for word, ratios in (
        ("disturbed over undisturbed", answer.hypervolume_ratios),
        ("undisturbed over the first of them", answer.noise_ratios),
    ):
        if ratios:
            print(f"hypervolume, {word}: {', '.join(f'{ratio:.3f}' for ratio in ratios)}", file=out)
    print("passed" if answer.passed else "FAILED", file=out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--parallel", type=int, default=3, help="trials at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--keep", type=Path, help="folder for logs and storage; a temporary one by default")
    parser.add_argument("--calm-runs", type=int, default=1, help="undisturbed runs to compare with; 2 show the noise")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.nodes < len(GPU_TYPES):
        parser.error(f"--nodes {options.nodes} is too few: at least {len(GPU_TYPES)}, one for each GPU type")
    return options


def main() -> int:
    """Parse, run, print; 0 where everything held."""
    options = parse_options()
    plan = Plan(**{key: getattr(options, key) for key in ("trials", "kills", "nodes", "parallel", "seed", "model")})
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        answer = measure(plan, folder, say, calm_runs=options.calm_runs)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(asdict(answer), indent=1))
    else:
        print_table(answer, sys.stdout)
    return 0 if answer.passed else 1


if __name__ == "__main__":
    sys.exit(main())
