"""What the calibrated model of a study says of something that was not asked: other settings, loads, users or nodes.

Nothing is launched and nothing is written. The model is corrected by every measurement of the study, and by those of
the earlier studies that taught it. Where the question itself changes (users, model, devices), its measurements count as
those of a related study do: they say how wrong the model is there, and the intervals are as wide as that leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import yaml

from perf_model.calibration import CalibratedPredictor, Measured
from search_spaces.engines import engine_spec
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import Device
from search_spaces.metrics import Direction, metric_info
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, OptionValue, Pool, Role, make_options
from search_spaces.slos import Slo
from search_spaces.space import PARALLEL_SIZES
from search_spaces.workload import Arrival, Load
from studies.history import StudyHistory
from studies.noise import asked_metrics
from studies.records import TrialRecord
from studies.repeats import candidates_of
from tuner.deploy.chosen import BEST, chosen_trial
from tuner.devices import load_devices
from tuner.earlier import lessons
from tuner.loop import sampled
from tuner.places import Place
from tuner.report import Z_90
from tuner.stored import make_report, stored_file
from tuner.study_file import differences, dump_study
from tuner.study_schema import StudyFile
from tuner.wiring import UNMEASURED_CORE, loads_of, make_predictor, make_problem

LOAD = "load"
SIZES = ("replicas", *PARALLEL_SIZES)
ASKED_KEYS = ("workload.", "model.", "measurement.", "emulation.", "calibration")
"""Keys of a study file whose change makes another question, of which the study measured nothing."""
LOAD_KEYS = ("workload.concurrency", "workload.request_rate", "workload.arrival", "workload.trace")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is predicted of one candidate under the changed question.

    `extrapolated` says what of it lies outside all that the study measured. `chances` are the probabilities that a
    measurement would meet each SLO, by metric. `measured` is the trial that measured exactly this, if one did.
    """

    candidate: Candidate
    prediction: Prediction
    chances: Mapping[str, float]
    extrapolated: tuple[str, ...]
    measured: int | None = None

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The 90% interval of a new measurement of `metric`; None where it is not predicted."""
        return interval_90(self.prediction, metric)


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """The answers, beside the trial that they start from: what was measured of it, and what the model says of it.

    `changes` of the study file are `key: old -> new`. `notes` say what the model has learnt from, and what is not
    known. `measurements` counts those of the study.
    """

    study: str
    base: TrialRecord
    base_prediction: Prediction
    problem: Problem
    settings: tuple[str, ...]
    changes: tuple[str, ...]
    answers: tuple[Answer, ...]
    measurements: int
    emulated: bool
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are shown: those of the question, throughput and the two basic latencies."""
        return tuple(dict.fromkeys((*asked_metrics(self.problem), "output_tokens_per_s")))


def interval_90(prediction: Prediction, metric: str) -> tuple[float, float] | None:
    """The 90% interval of a new measurement of `metric`, from the standard deviation of its logarithm."""
    if metric not in prediction.metrics:
        return None
    factor = math.exp(Z_90 * prediction.log_stddev.get(metric, 0.0))
    return prediction.metrics[metric] / factor, prediction.metrics[metric] * factor


@dataclass(frozen=True, kw_only=True)
class CalibratedStudy:
    """A stored study with its model as its measurements, `learned`, have corrected it."""

    history: StudyHistory
    place: Place
    file: StudyFile
    problem: Problem
    devices: Mapping[str, Device]
    trials: tuple[TrialRecord, ...]
    learned: tuple[Measured, ...]
    model: CalibratedPredictor
    notes: tuple[str, ...]

    @property
    def measured(self) -> tuple[TrialRecord, ...]:
        """Every measured candidate once, with the means of its runs."""
        return tuple(trial for trial in candidates_of(self.trials) if trial.candidate and trial.measurement)


def calibrated_study(history: StudyHistory, place: Place) -> CalibratedStudy:
    """The stored study with its corrected model; the earlier studies that taught it are learnt from too."""
    file = stored_file(history, place)
    devices = history.node_devices or load_devices(place.nodes(file.name))
    problem = make_problem(file, devices)
    found = lessons(history.storage, place, file, problem) if file.earlier_studies == "related" else ()
    earlier = tuple(observation for lesson in reversed(found) for observation in lesson.observations)
    trials = history.trials()
    measured = [trial for trial in trials if trial.candidate and trial.measurement]
    pairs = tuple(
        (t.candidate, t.measurement.metrics.flat()) for t in sampled(measured) if t.candidate and t.measurement
    )
    model = replace(make_predictor(problem, file), earlier=earlier).learned(pairs)
    count = f"corrected by {len(pairs)} measurements of {history.name}"
    if len(pairs) < len(measured):
        count += f" (of {len(measured)}; the others add little)"
    notes = (count, *(f"and by the earlier study {lesson}" for lesson in found))
    return CalibratedStudy(
        history=history,
        place=place,
        file=file,
        problem=problem,
        devices=devices,
        trials=trials,
        learned=pairs,
        model=model,
        notes=notes,
    )


def what_if(history: StudyHistory, place: Place, settings: Sequence[str], *, trial: str = BEST) -> WhatIf:
    """The answer of the calibrated model of a study for `trial` with `settings` changed.

    A setting is `ROLE.NAME=VALUE` of the configuration (roles mixed, prefill, decode), `load=VALUE`, or a key of the
    study file. Raises `TunerError` for a setting or a trial that is not there, and for a study without a measurement.
    """
    study = calibrated_study(history, place)
    base, _ = chosen_trial(make_report(history, study.file), trial)
    if base.candidate is None:
        raise InvalidValueError(f"trial {base.number} has no configuration; choose another one with --trial")
    own, of_file = split(settings)
    file = stored_file(history, place, of_file)
    if file.name != study.file.name:
        raise InvalidValueError(f"name={file.name!r} changes nothing that a model could answer; leave it out")
    changes = tuple(differences(dump_study(study.file), dump_study(file)))
    problem, unmeasured = _problem(study, file)
    model = _model(study, file, problem, changes)
    base_candidate = changed(base.candidate, own)
    candidates = tuple(
        replace(base_candidate, load=load) for load in _loads(file, problem, base_candidate, own, changes)
    )
    return WhatIf(
        study=history.name,
        base=base,
        base_prediction=study.model.predict([base.candidate])[0],
        problem=problem,
        settings=tuple(settings),
        changes=changes,
        answers=tuple(_answer(candidate, model, problem, study, changes) for candidate in candidates),
        measurements=len(study.measured),
        emulated=any(t.measurement is not None and t.measurement.emulated for t in study.measured),
        notes=(*study.notes, *unmeasured),
    )


def split(settings: Sequence[str]) -> tuple[dict[str, OptionValue], list[str]]:
    """`settings` of the configuration by name (`decode.tp`, `load`), and those of the study file as they are."""
    roles, own, of_file = [str(role) for role in Role], {}, []
    for text in settings:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise InvalidValueError(f"--set {text!r} sets nothing; write such as --set decode.tp=4 or --set load=32")
        if name in {"mode", "engine"}:
            raise InvalidValueError(f"--set {text}: start from a trial of that {name} instead: --trial NUMBER")
        if name == LOAD or name.split(".")[0] in roles:
            own[name] = _value(text, value)
        else:
            of_file.append(text)
    return own, of_file


def _value(setting: str, text: str) -> OptionValue:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidValueError(f"--set {setting!r}: {text!r} is no valid YAML value; quote it") from error
    if not isinstance(value, (str, int, float)):
        raise InvalidValueError(f"--set {setting}: {text!r} is no single value; give a number, a word, true or false")
    return value


def changed(candidate: Candidate, own: Mapping[str, OptionValue]) -> Candidate:
    """`candidate` with the settings `own`."""
    pools = {str(pool.role): pool for pool in candidate.config.pools}
    for name, value in own.items():
        role, _, setting = name.partition(".")
        if name == LOAD:
            candidate = replace(candidate, load=_load(candidate.load.arrival, value))
            continue
        if role not in pools:
            there = ", ".join(pools)
            raise InvalidValueError(
                f"--set {name}={value}: the {candidate.config.mode} trial has no {role} pool, but {there}; "
                "start from another trial with --trial NUMBER"
            )
        pools[role] = _with_setting(pools[role], setting, value, candidate.config.engine)
    return replace(candidate, config=replace(candidate.config, pools=tuple(pools.values())))


def _load(arrival: Arrival, value: OptionValue) -> Load:
    if isinstance(value, (str, bool)):
        raise InvalidValueError(f"--set load={value}: give a number ({arrival.load_unit})")
    return Load(arrival=arrival, value=float(value))


def _with_setting(pool: Pool, name: str, value: OptionValue, engine: str) -> Pool:
    if name == "node_pool":
        return replace(pool, node_pool=str(value))
    if name in SIZES:
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidValueError(f"--set {pool.role}.{name}={value}: give a whole number of at least 1")
        if name == "replicas":
            return replace(pool, replicas=value)
        return replace(pool, parallelism=replace(pool.parallelism, **{name: value}))
    return _with_option(pool, name, value, engine)


def _with_option(pool: Pool, name: str, value: OptionValue, engine: str) -> Pool:
    spec, options = engine_spec(engine), dict(pool.options)
    if name not in options:
        known = ", ".join(("node_pool", *SIZES, *options))
        raise InvalidValueError(f"--set {pool.role}.{name}={value}: the pool has no {name}; it has {known}")
    parameter = spec.parameter(name)
    if not parameter.accepts(value):
        choices = ", ".join(map(str, parameter.choices))
        raise InvalidValueError(f"--set {pool.role}.{name}={value} is outside the limits of {engine}: {choices}")
    ranks = int(value) if name == spec.devices_per_rank_option else pool.devices_per_rank
    return replace(pool, options=make_options(options | {name: value}), devices_per_rank=ranks)


def _problem(study: CalibratedStudy, file: StudyFile) -> tuple[Problem, tuple[str, ...]]:
    """The changed question, and which of its pools have cores that nobody measured."""
    on_cpus = [name for name, pool in file.node_pools.items() if pool.device == "cpu"]
    known = {name: study.devices[name] for name in on_cpus if name in study.devices}
    core = f"{UNMEASURED_CORE.flops['fp32'] / 1e9:g} GFLOP/s"
    notes = tuple(f"pool {name}: NOT MEASURED, a core of {core} stands in" for name in on_cpus if name not in known)
    return make_problem(file, known), notes


def _model(study: CalibratedStudy, file: StudyFile, problem: Problem, changes: Sequence[str]) -> CalibratedPredictor:
    """The model of the changed question with what the study knows; of another question it counts as a related study."""
    if problem == study.problem:
        return study.model
    name = study.file.name if any(line.startswith(ASKED_KEYS) for line in changes) else ""
    observed = study.model.observed(study.learned, study=name)
    earlier = (*study.model.earlier, *observed)
    return replace(make_predictor(problem, file), earlier=earlier).learned(())


def _loads(
    file: StudyFile,
    problem: Problem,
    candidate: Candidate,
    own: Mapping[str, OptionValue],
    changes: Sequence[str],
) -> tuple[Load, ...]:
    """The load that was set, else the changed ones of the study file, else that of the trial."""
    arrival = problem.workload.arrival
    if LOAD in own:
        return (_load(arrival, own[LOAD]),)
    if any(line.startswith(LOAD_KEYS) for line in changes):
        return tuple(Load(arrival=arrival, value=float(value)) for value in loads_of(file, problem.workload))
    return (candidate.load,)


def _answer(
    candidate: Candidate,
    model: CalibratedPredictor,
    problem: Problem,
    study: CalibratedStudy,
    changes: Sequence[str],
) -> Answer:
    for pool in candidate.config.pools:
        problem.node_pool(pool.node_pool)  # raises for a pool that is not there
    reason = infeasibility(candidate, problem)
    prediction = model.predict([candidate])[0] if reason is None else Prediction(metrics={}, infeasible=reason)
    same = next((t.number for t in study.measured if t.key == candidate.key), None)
    asked = [line for line in changes if line.startswith(ASKED_KEYS) and not line.startswith(LOAD_KEYS)]
    return Answer(
        candidate=candidate,
        prediction=prediction,
        chances={slo.metric: chance(prediction, slo) for slo in problem.slos if slo.metric in prediction.metrics},
        extrapolated=(
            *(f"{line}: the study measured nothing there" for line in asked),
            *beyond(candidate, study.measured, study.problem, problem),
        ),
        measured=same if problem == study.problem else None,
    )


def chance(prediction: Prediction, slo: Slo) -> float:
    """Probability that a measurement meets the threshold of `slo`: its logarithm is taken for normal."""
    value, spread = prediction.metrics[slo.metric], prediction.log_stddev.get(slo.metric, 0.0)
    if value <= 0 or spread <= 0:
        return float(slo.violation(value) <= 0)
    below = 0.5 * (1 + math.erf(math.log(slo.threshold / value) / spread / math.sqrt(2)))
    return below if metric_info(slo.metric).direction is Direction.MINIMIZE else 1 - below


def beyond(candidate: Candidate, measured: Sequence[TrialRecord], old: Problem, new: Problem) -> tuple[str, ...]:
    """What of `candidate` lies outside everything that was `measured`, in words; empty where nothing does.

    Numbers are outside where they are above the largest or below the smallest that was measured in the same role; words
    and devices where none was alike. What lies between measured values is not named.
    """
    known = [trial.candidate for trial in measured if trial.candidate is not None]
    found = _load_beyond(candidate.load, [c.load for c in known])
    types = {pool.name: pool.device.name for pool in old.node_pools}
    for pool in candidate.config.pools:
        alike = [p for c in known if c.config.engine == candidate.config.engine for p in c.config.pools]
        alike = [p for p in alike if p.role is pool.role]
        device = new.node_pool(pool.node_pool).device.name
        if device not in {types[p.node_pool] for p in alike}:
            found.append(f"{pool.role} on {device}: no {pool.role} replica was measured on such a device")
        for name, value in settings_of(pool).items():
            found += _value_beyond(f"{pool.role}.{name}", value, [settings_of(p).get(name) for p in alike])
    return tuple(found)


def settings_of(pool: Pool) -> dict[str, OptionValue]:
    """Replicas, parallel sizes and options of `pool` by name."""
    sizes: dict[str, OptionValue] = {"replicas": pool.replicas}
    sizes |= {name: getattr(pool.parallelism, name) for name in PARALLEL_SIZES}
    return sizes | dict(pool.options)


def _load_beyond(load: Load, known: Sequence[Load]) -> list[str]:
    same = [other.value for other in known if other.arrival is load.arrival]
    if not same:
        return [f"{load.arrival} arrivals: none were measured"]
    return _value_beyond(load.arrival.load_unit, load.value, same)


def _value_beyond(name: str, value: OptionValue, known: Sequence[OptionValue | None]) -> list[str]:
    there = [other for other in known if other is not None]
    if not there or value in there:
        return []
    numbers = [other for other in there if not isinstance(other, (str, bool))]
    if isinstance(value, (str, bool)) or not numbers:
        return [f"{name}={value}: measured were {', '.join(sorted({str(other) for other in there}))}"]
    low, high = min(numbers), max(numbers)
    if low <= value <= high:
        return []
    return [f"{name}={value:g}: measured were {low:g}" + (f" to {high:g}" if high > low else "")]
