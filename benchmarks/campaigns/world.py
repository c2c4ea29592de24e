"""An emulated world for campaigns: twelve small studies, and GPUs whose answers follow from a hidden formula.

EMULATED: no figure says anything of a GPU. A measurement is what the uncorrected performance model says, with TTFT and
TPOT times factors that the search does not know: one of the world (what the model has wrong everywhere), slopes over
tensor-parallel size and load, one of each model and GPU, one of each configuration and a small one of each run. The
first are alike in all studies of a world, so that one can teach another; the later ones are not. A setting, drawn for
each world, runs out of memory under load. Start-up and measurement take device-hours by formula, and no time.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import moocore
import numpy as np

import tuner.wiring
from benchmarks.slowed import slowed
from cluster.runner import Running, TrialHandle, TrialRequest
from perf_model.predictor import Predictor
from perf_model.serving_predictor import ServingPredictor
from search_spaces.hardware import Device, NodePool
from search_spaces.metrics import Direction
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome, Prediction
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, ServingConfig
from search_spaces.space import Space
from studies.acquisition import front_scale, nondominated
from studies.constraints import measured_violations
from studies.records import TrialRecord, TrialStatus
from tuner.access import Connect
from tuner.places import Place
from tuner.study_schema import StudyFile
from tuner.wiring import make_problem, make_space, uncalibrated

START_S, LEAST_MEASURE_S, MOST_MEASURE_S = 60.0, 30.0, 180.0
"""Seconds: the median start of an engine, and the bounds of a measurement."""
WORLD, SLOPE, OF_MODEL, OF_GPU, OF_CONFIG, OF_RUN = 0.5, 0.2, 0.1, 0.1, 0.04, 0.02
"""Standard deviations of the logarithms of the hidden factors; the slope's is for each doubling."""

MODELS = {"llama-8b": "Llama-3.1-8B", "qwen-32b": "Qwen3-32B", "llama-70b": "Llama-3.1-70B"}
SPACES = {
    "llama-8b": "{tp: 1, replicas: 1}",
    "qwen-32b": "{tp: [1, 2, 4], replicas: [1, 2]}",
    "llama-70b": "{tp: [2, 4, 8], replicas: 1}",
}
USERS = {
    "chat": "{isl: {mean: 1024, spread: 0.25}, osl: {mean: 256, spread: 0.25}, concurrency: [4, 16, 64, 128]}",
    "rag": "{isl: {mean: 8192, spread: 0.25}, osl: {mean: 128, spread: 0.25}, concurrency: [2, 8, 32]}",
    "code": "{isl: {mean: 2048, spread: 0.25}, osl: {mean: 64, spread: 0.25}, concurrency: [2, 8, 32, 64]}",
}
GPUS = {"h100": 24.0, "a100": 12.0}
COMMON = """
  slos: {{ttft_p99_ms: 3000}}
  objectives: [output_tokens_per_s_per_gpu, output_tokens_per_s_per_user]
  engines:
    emulated: {{max_num_seqs: [16, 64, 256], max_num_batched_tokens: [1024, 2048, 8192], enable_chunked_prefill: true,
      enable_prefix_caching: true, kv_cache_dtype: auto, gpu_memory_utilization: [0.8, 0.95]}}
  space: {{modes: [aggregated], replicas: [1, 2]}}
  budget: {{trials: 200, confirm: 1, control_every: 0}}
  seed: {seed}
"""


def campaign_text(
    seed: int, device_hours: float, *, name: str = "twelve", users: Sequence[str] = ("chat", "rag")
) -> str:
    """The campaign file: three models, two kinds of users and two kinds of nodes."""
    lines = [f"name: {name}", "common:", COMMON.format(seed=seed).strip("\n"), "matrix:", "  model:"]
    lines += [f"    {key}: {{model: {{name: {model}}}, space: {SPACES[key]}}}" for key, model in MODELS.items()]
    lines += ["  users:", *(f"    {key}: {{workload: {USERS[key]}}}" for key in users), "  nodes:"]
    lines += [
        f"    {gpu}: {{node_pools: {{{gpu}: {{device: {gpu}_sxm, nodes: 1, gpus_per_node: 8, "
        f"price_per_hour: {price}}}}}}}"
        for gpu, price in GPUS.items()
    ]
    return "\n".join([*lines, f"budget: {{device_hours: {device_hours}}}", "slices: {trials: 3, first: 3}", ""])


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """What the search does not know of a world."""

    seed: int

    def draw(self, what: str, spread: float) -> float:
        """A normal number of standard deviation `spread`, the same whenever `what` is asked for."""
        return random.Random(f"{self.seed}:{what}").gauss(0.0, spread)

    def slower(self, latency: str, candidate: Candidate, problem: Problem, run: str | None) -> float:
        """The factor on `latency` (ttft or tpot) of a candidate; `run` names a run of it, None for no noise."""
        (pool,) = candidate.config.pools
        gpu = problem.node_pool(pool.node_pool).device.name
        log = self.draw(f"{latency}:world", WORLD)
        log += self.draw(f"{latency}:tp", SLOPE) * math.log2(pool.parallelism.tp)
        log += self.draw(f"{latency}:load", SLOPE / 2) * math.log2(candidate.load.value / 16.0)
        log += self.draw(f"{latency}:{problem.model.name}", OF_MODEL) + self.draw(f"{latency}:{gpu}", OF_GPU)
        log += self.draw(f"{latency}:{problem.model.name}:{candidate.config.key}", OF_CONFIG)
        return math.exp(log + (self.draw(f"{latency}:{run}", OF_RUN) if run is not None else 0.0))

    def breaks(self, candidate: Candidate) -> bool:
        """True for the setting that runs out of memory under load in this world."""
        (pool,) = candidate.config.pools
        seqs = random.Random(f"{self.seed}:breaks").choice((64, 256))
        return pool.option("gpu_memory_utilization") == 0.95 and pool.option("max_num_seqs") == seqs

    def start_s(self, config: ServingConfig) -> float:
        """Seconds until the replicas are ready."""
        return START_S * math.exp(self.draw(f"start:{config.key}", 0.3))


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The answers of a world to one study."""

    hidden: Hidden
    model: Predictor
    problem: Problem
    requests: int

    def outcome(self, candidate: Candidate, run: str | None) -> Outcome:
        """What a run gives; without noise where `run` is None."""
        (prediction,) = self.model.predict([candidate])
        return self.judged(candidate, prediction, run)

    def judged(self, candidate: Candidate, said: Prediction, run: str | None) -> Outcome:
        """The outcome of `candidate`, of which the model says `said`."""
        start = {"start": self.hidden.start_s(candidate.config)}
        if said.infeasible is not None:
            detail = f"emulated: {said.infeasible}"
            return Failure(reason=FailureReason.OUT_OF_MEMORY_AT_BOOT, detail=detail, timings_s=start)
        if self.hidden.breaks(candidate):
            detail = "emulated: CUDA out of memory"
            timings = {**start, "measure": LEAST_MEASURE_S}
            return Failure(reason=FailureReason.OUT_OF_MEMORY_UNDER_LOAD, detail=detail, timings_s=timings)
        return self._measurement(candidate, said.metrics, run, start)

    def _measurement(
        self, candidate: Candidate, said: Mapping[str, float], run: str | None, start: Mapping[str, float]
    ) -> Measurement:
        ttft = self.hidden.slower("ttft", candidate, self.problem, run)
        tpot = self.hidden.slower("tpot", candidate, self.problem, run)
        first, last = said["ttft_mean_ms"], said["e2e_mean_ms"]
        whole = (first * ttft + max(0.0, last - first) * tpot) / last
        factors = {"ttft": ttft, "tpot": tpot, "itl": tpot, "e2e": whole}
        metrics = slowed(said, factors, requests=self.requests, devices=candidate.config.devices)
        measure_s = min(MOST_MEASURE_S, max(LEAST_MEASURE_S, 1.2 * metrics.duration_s))
        timings = {**start, "measure": measure_s}
        return Measurement(metrics=metrics, client_lateness_ms=0.0, timings_s=timings, emulated=True)


@dataclass
class EmulatedRunner:
    """Gives out the outcome of a trial at the first poll; see `cluster.runner.TrialRunner`."""

    truth: Truth
    study: str
    _trials: dict[str, TrialRequest] = field(default_factory=dict)

    def start(self, request: TrialRequest) -> TrialHandle:
        """Remember the trial."""
        self._trials[request.trial] = request
        return TrialHandle(trial=request.trial, config_key=request.candidate.config.key)

    def poll(self, handle: TrialHandle) -> Running | Outcome:
        """The outcome; the noise is that of the candidate's run in this study."""
        request = self._trials.pop(handle.trial)
        return self.truth.outcome(request.candidate, f"{self.study}:{request.candidate.key}")

    def stop(self, handle: TrialHandle) -> None:
        """Forget the trial."""
        self._trials.pop(handle.trial, None)

    def warm(self) -> tuple[ServingConfig, ...]:
        """Nothing stays up: every trial pays its start."""
        return ()

    def release(self) -> None:
        """There is nothing to release."""

    def close(self) -> None:
        """Forget what is left."""
        self._trials.clear()


@dataclass(frozen=True, kw_only=True)
class EmulatedNodes:
    """See `tuner.access.Cluster`."""

    truth: Truth
    trials_at_once: int = 1

    def measure(self, pool: NodePool) -> Device:
        """There are no CPU pools."""
        raise AssertionError(f"pool {pool.name} has GPUs: nothing is to be measured")

    def runner(self, study: str) -> EmulatedRunner:
        """The runner."""
        return EmulatedRunner(self.truth, study)


@cache
def truth_of(study: str, seed: int) -> tuple[Truth, StudyFile]:
    """The answers to the study of the canonical text `study` in the world `seed`."""
    from tuner.study_file import parse_study

    file = parse_study(study, name="emulated study")
    problem = make_problem(file)
    model = uncalibrated(problem, file)
    requests = file.measurement.requests
    return Truth(hidden=Hidden(seed=seed), model=model, problem=problem, requests=requests), file


def keep_models() -> None:
    """Let this process build the performance model of each problem once: the answers are the same, only sooner.

    A slice of a real campaign builds its own; here, where trials take no time, that would be most of it.
    """
    build = tuner.wiring.serving_model
    models: dict[tuple[str, int], ServingPredictor] = {}

    def kept(problem: Problem, study: StudyFile) -> ServingPredictor:
        key = repr(problem), study.measurement.requests
        if key not in models:
            models[key] = build(problem, study)
        return models[key]

    tuner.wiring.serving_model = kept


def connector(file: StudyFile, seed: int) -> Connect:
    """Reaches the nodes of a world."""
    from tuner.study_file import dump_study

    named = file.model_copy(update={"name": "any", "earlier_studies": "none"})
    truth, _ = truth_of(dump_study(named), seed)

    @contextmanager
    def connect(_problem: Problem, _place: Place) -> Iterator[EmulatedNodes]:
        yield EmulatedNodes(truth=truth)

    return connect


# --------------------------------------------------------------------------------------------------------- the measure


def every_candidate(space: Space) -> Iterator[Candidate]:
    """Each candidate of a space once."""
    seen = set()
    names = [parameter.name for parameter in space.parameters]
    for values in itertools.product(*(parameter.choices for parameter in space.parameters)):
        candidate = space.decode(dict(zip(names, values, strict=True)))
        if candidate.key not in seen and infeasibility(candidate, space.problem) is None:
            seen.add(candidate.key)
            yield candidate


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """Shares of the hypervolume of a study's true front, without noise; 0 where no candidate meets the SLOs.

    Objectives are scaled to the front's range, the reference point lies a tenth beyond its nadir.
    """

    truth: Truth
    total: float
    ideal: tuple[float, ...]
    span: tuple[float, ...]
    reference: tuple[float, ...]
    candidates: int

    def share(self, trials: Sequence[TrialRecord]) -> float:
        """What the measured candidates of `trials` hold of it."""
        candidates = [t.candidate for t in trials if t.status is TrialStatus.MEASURED and t.candidate is not None]
        points = [point for candidate in candidates if (point := point_of(self.truth, candidate)) is not None]
        if not points or self.total == 0:
            return 0.0
        scaled = (np.array(points) - np.array(self.ideal)) / np.array(self.span)
        return float(moocore.hypervolume(scaled, ref=np.array(self.reference))) / self.total


_POINTS: dict[tuple[int, str], tuple[float, ...] | None] = {}


def point_of(truth: Truth, candidate: Candidate) -> tuple[float, ...] | None:
    """The true objectives of a candidate, to be minimised; None where it fails or misses an SLO."""
    key = (id(truth), candidate.key)
    if key not in _POINTS:
        _POINTS[key] = _minimised(truth, truth.outcome(candidate, None))
    return _POINTS[key]


def _minimised(truth: Truth, outcome: Outcome) -> tuple[float, ...] | None:
    if not isinstance(outcome, Measurement):
        return None
    flat = outcome.metrics.flat()
    if any(value > 0 for value in measured_violations(truth.problem.slos, flat).values()):
        return None
    return tuple(
        -flat[o.metric] if o.direction is Direction.MAXIMIZE else flat[o.metric] for o in truth.problem.objectives
    )


def yardstick(file: StudyFile, seed: int) -> Yardstick:
    """The yardstick of a study in a world: every candidate is asked once."""
    from tuner.study_file import dump_study

    named = file.model_copy(update={"name": "any", "earlier_studies": "none"})
    truth, _ = truth_of(dump_study(named), seed)
    candidates = list(every_candidate(make_space(file, truth.problem)))
    for candidate, said in zip(candidates, truth.model.predict(candidates), strict=True):
        _POINTS[id(truth), candidate.key] = _minimised(truth, truth.judged(candidate, said, None))
    found = [point for candidate in candidates if (point := point_of(truth, candidate)) is not None]
    if not found:
        nothing = (0.0,) * len(truth.problem.objectives)
        return Yardstick(truth=truth, total=0.0, ideal=nothing, span=nothing, reference=nothing, candidates=0)
    points = np.array(found)
    scale = front_scale(points)
    front = scale.apply(points[nondominated(points)])
    return Yardstick(
        truth=truth,
        total=float(moocore.hypervolume(front, ref=scale.reference)),
        ideal=tuple(scale.ideal),
        span=tuple(scale.span),
        reference=tuple(scale.reference),
        candidates=len(candidates),
    )
