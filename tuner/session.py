"""One run of a study from its file to its end: open, connect, measure the nodes once, search, close."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace

from perf_model.calibration import CalibratedPredictor
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import Device, DeviceKind
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.space import Space
from studies.errors import StudyFileChangedError
from studies.history import StudyHistory
from studies.holding import suspicions
from studies.lease import Lease, LeaseTimes, take_lease, times_for
from studies.pareto import front
from studies.records import TrialStatus
from studies.repeats import lacking_runs
from studies.samplers import SamplerKind
from studies.screen import Handed
from studies.stopping import StopReason, progress_of
from studies.storage import Storage, faults_told, open_storage
from studies.study import Study, StudySetup, create_study, open_study
from tuner.access import Cluster, Connect
from tuner.deploy.archives import attach_deployments
from tuner.devices import load_devices, save_devices
from tuner.earlier import Lesson, lessons, seeds
from tuner.loop import LearningModel, Search, SearchPlan
from tuner.observer import Observer
from tuner.places import Place
from tuner.recording import Recording
from tuner.report import StudyReport
from tuner.report_dashboard import publish
from tuner.stored import find_history, make_report
from tuner.study_errors import StudyFileError
from tuner.study_file import differences, dump_study, in_order_of, parse_study
from tuner.study_schema import BudgetSection, StudyFile
from tuner.table_places import own_notes
from tuner.wiring import make_budget, make_limits, make_predictor, make_problem, make_repeats, make_rule, make_space
from tuner.wording import number, slo_text

FREE_TO_CHANGE = ("budget.",)
"""Keys that may differ from the stored study file: how long to search is no part of the question."""
ENDED_BY = "the search ended: "
"""How the log of a study says why a run of it has ended."""
LEASE_EXPIRY_VARIABLE, LEASE_WAIT_VARIABLE = "TUNER_LEASE_EXPIRY_S", "TUNER_LEASE_WAIT_S"

Stop = AbstractContextManager[Callable[[], bool]]


@dataclass(frozen=True, kw_only=True)
class Again:
    """A measured trial that shall have so many runs, whatever the budget of trials says."""

    trial: int
    runs: int


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A study, and how far this run of it goes: to the budget of its file where `portion` is None.

    `again` is what is measured once more.
    """

    file: StudyFile
    portion: BudgetSection | None
    again: Again | None

    def run_of(self, file: StudyFile) -> StudyFile:
        """`file` with the budget of this run."""
        return file if self.portion is None else file.model_copy(update={"budget": self.portion})


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended: `reason` is None where it was stopped on request, by a signal or by `stop_order`."""

    reason: StopReason | None
    stop_order: str | None = None
    report: StudyReport


def run_study(
    file: StudyFile,
    place: Place,
    *,
    connect: Connect,
    stop: Stop,
    observer: Observer,
    portion: BudgetSection | None = None,
    again: Again | None = None,
) -> Ended:
    """Begin the study of `file`, or go on with it where the storage has it, and search until it ends.

    Where a `portion` is given, this run ends with that budget, and the study keeps the one of its file. What is to be
    measured `again` has its runs then.

    `stop` is entered for the time of the search, and says then whether someone asked to stop. Raises
    `StudyFileChangedError`, with the difference, where the study was made with another file.
    """
    storage, asked = open_storage(place.url), _Asked(file=file, portion=portion, again=again)
    with faults_told(storage), take_lease(storage, file.name, lease_times(), wait_s=lease_wait_s()) as lease:
        recording = Recording(observer=observer, note_line=lease.note)
        recording.note(f"run {lease.run} of study {file.name} by process {os.getpid()} on host {socket.gethostname()}")
        ended = _run(asked, place, storage, lease, connect=connect, stop=stop, observer=recording)
        recording.note(f"{ENDED_BY}{ended.reason or ended.stop_order or 'it was interrupted'}")
        return ended


def _run(
    asked: _Asked,
    place: Place,
    storage: Storage,
    lease: Lease,
    *,
    connect: Connect,
    stop: Stop,
    observer: Observer,
) -> Ended:
    file = asked.file
    history = find_history(storage, file.name)
    stored = history.study_file if history else dump_study(file)
    check_same_question(file, stored, observer)
    before = parse_study(stored, name=f"stored study file of {file.name}")
    file = in_order_of(before, file)
    run = asked.run_of(file)
    problem, space = check_space(file)
    if history and _is_done(history, run) and asked.again is None:
        observer.note(f"study {file.name} has used its budget of {run.budget.trials} trials; nothing to measure")
        return Ended(reason=StopReason.TRIALS, report=make_report(history, file))
    observer.note(f"{'going on with' if history else 'beginning'} study {file.name}: {_question(problem, space)}")
    with connect(problem, place) as cluster:
        known = (history.node_devices if history else {}) or load_devices(place.nodes(file.name))
        devices = _with_measured(known, file, problem, place, cluster, observer)
        problem = make_problem(file, devices)
        for line in own_notes(problem):
            observer.note(line)
        found = lessons(storage, place, file, problem) if file.earlier_studies == "related" else ()
        model = LearningModel(_taught(make_predictor(problem, file), found, observer))
        setup = _setup(file, place, stored, problem, devices, model, cluster.trials_at_once)
        setup = replace(setup, repeats=make_repeats(run))
        setup = replace(setup, handed=_handed(found, space, observer))
        study = open_study(storage, setup, lease) if history else create_study(storage, setup, lease)
        if asked.portion is None:
            study.note_ended(None)
            if file.budget != before.budget:
                study.keep_file(dump_study(file))
        study.note_earlier([str(lesson) for lesson in found])
        if asked.again is not None:
            study.repeat(asked.again.trial, asked.again.runs)
        reason = _search(study, run, place, model, cluster, stop, observer)
        study.flush()
        if asked.portion is None:
            study.note_ended(reason)
        order = f"stopped on the order of {lease.stop_order.by}" if lease.stop_order and reason is None else None
        report = make_report(study.history, file)
        lease.ensure()
        if asked.portion is None:  # who gives out portions publishes when the study is done
            publish(storage, report)
            for line in attach_deployments(storage, place, report, file):
                observer.note(line)
        return Ended(reason=reason, stop_order=order, report=report)


def _taught(predictor: CalibratedPredictor, found: Sequence[Lesson], observer: Observer) -> CalibratedPredictor:
    """`predictor` with what related studies teach it."""
    if found:
        observer.note(f"the model is corrected by earlier studies: {'; '.join(map(str, found))}")
    return replace(predictor, earlier=tuple(o for lesson in reversed(found) for o in lesson.observations))


def _handed(found: Sequence[Lesson], space: Space, observer: Observer) -> Handed:
    """The fronts of related studies for the screen to look at, and what failed in those that are nearest."""
    chosen = seeds(found, space)
    if chosen:
        counts = "; ".join(f"{study} ({len(candidates)} candidates)" for study, candidates in chosen.items())
        observer.note(
            f"the fronts of earlier studies are looked at, and measured where the model expects a gain: {counts}"
        )
    return Handed(
        hints=tuple(candidate for candidates in chosen.values() for candidate in candidates),
        suspected=suspicions(trial for lesson in found for trial in lesson.ended),
    )


def lease_times() -> LeaseTimes:
    """How long a lease lives without a heartbeat: the variable TUNER_LEASE_EXPIRY_S, 60 s by default."""
    return times_for(_seconds(LEASE_EXPIRY_VARIABLE, 60.0))


def lease_wait_s() -> float:
    """How long to wait for the lease of another coordinator: the variable TUNER_LEASE_WAIT_S, not at all by default."""
    return _seconds(LEASE_WAIT_VARIABLE, 0.0)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, f"{default:g}")
    try:
        return float(text)
    except ValueError as error:
        raise InvalidValueError(f"{variable}={text!r} is no number of seconds; set such as {default:g}") from error


def check_same_question(file: StudyFile, stored: str, observer: Observer) -> None:
    """Raise `StudyFileChangedError` where `file` asks another question than the `stored` study file.

    The budget may change: how long to search is no part of the question.
    """
    before = dump_study(parse_study(stored, name=f"stored study file of {file.name}"))
    changed = differences(before, dump_study(file))
    free = [line for line in changed if line.startswith(FREE_TO_CHANGE)]
    asked = [line for line in changed if line not in free]
    if asked:
        raise StudyFileChangedError(
            "\n".join(
                [
                    f"study {file.name!r} was made with another study file; the differences (stored -> given):",
                    *(f"  {line}" for line in asked),
                    f"resume it as it was with: tuner study resume {file.name}",
                    f"or ask the new question under another name: --set name={file.name}-2",
                ]
            )
        )
    for line in free:
        observer.note(f"the budget changes: {line}")


def check_space(file: StudyFile) -> tuple[Problem, Space]:
    """Problem and space of `file`; raises `StudyFileError` where no default configuration can run."""
    problem = make_problem(file)
    space = make_space(file, problem)
    defaults = [space.default(mode, engine) for engine in space.engines for mode in space.modes]
    reasons = [infeasibility(candidate, problem) for candidate in defaults]
    if all(reasons):
        listed = "\n".join(f"  {c.config.engine}, {c.config.mode}: {r}" for c, r in zip(defaults, reasons, strict=True))
        raise StudyFileError(f"no configuration of study {file.name!r} can run:\n{listed}")
    return problem, space


def _is_done(history: StudyHistory, file: StudyFile) -> bool:
    """True where the budget is used, the front is confirmed, and no repeat waits."""
    trials = history.trials()
    lacking = lacking_runs(trials, front(trials, history.directions), make_repeats(file))
    waiting = any(trial.is_repeat and trial.status is TrialStatus.WAITING for trial in trials)
    return progress_of(trials).finished >= file.budget.trials and not any(lacking.values()) and not waiting


def _question(problem: Problem, space: Space) -> str:
    objectives = ", ".join(f"{objective.metric} ({objective.direction})" for objective in problem.objectives)
    slos = ", ".join(map(slo_text, problem.slos)) or "none"
    return f"model {problem.model.name}, {space.size:,} genotypes, objectives {objectives}, SLOs {slos}"


def _with_measured(
    stored: Mapping[str, Device],
    file: StudyFile,
    problem: Problem,
    place: Place,
    cluster: Cluster,
    observer: Observer,
) -> dict[str, Device]:
    """The `stored` devices of the CPU pools, and those of other ones measured now.

    What is measured is written beside the study too, where `tuner predict` finds it without a storage.
    """
    known = dict(stored)
    missing = [p for p in problem.node_pools if p.device.kind is DeviceKind.CPU and p.name not in known]
    for pool in missing:
        observer.note(f"measuring what a node of pool {pool.name} can do (once per study)")
        known[pool.name] = cluster.measure(pool)
        observer.note(_device_text(pool.name, known[pool.name]))
    if missing:
        save_devices(place.nodes(file.name), known)
    return known


def _device_text(pool: str, device: Device) -> str:
    flops = max(device.flops.values()) / 1e9
    return f"one core of pool {pool}: {number(flops)} GFLOP/s, {number(device.memory_bandwidth / 1e9)} GB/s memory"


def _setup(
    file: StudyFile,
    place: Place,
    stored: str,
    problem: Problem,
    devices: Mapping[str, Device],
    model: LearningModel,
    in_flight: int,
) -> StudySetup:
    return StudySetup(
        name=file.name,
        problem=problem,
        space=make_space(file, problem),
        study_file=stored,
        directory=place.directory,
        seed=file.seed,
        budget_trials=file.budget.trials,
        in_flight=in_flight,
        predict=model.predict,
        shared=model.shared,
        devices=devices,
        sampler=SamplerKind(file.sampler),
    )


def _search(
    study: Study,
    file: StudyFile,
    place: Place,
    model: LearningModel,
    cluster: Cluster,
    stop: Stop,
    observer: Observer,
) -> StopReason | None:
    touched = study.reconcile()
    place.clear_work(file.name)
    if touched:
        trials = ", ".join(str(trial.number) for trial in touched)
        observer.note(f"an earlier run left trials behind; settled, or to be repeated: {trials}")
    plan = SearchPlan(
        problem=study.setup.problem,
        rule=make_rule(file),
        limits=make_limits(file),
        budget=make_budget(file),
        work_dir=place.trials(file.name),
        seed=file.seed,
        in_flight=cluster.trials_at_once,
    )
    with stop as signalled, closing(cluster.runner(file.name)) as runner:

        def stop_requested() -> bool:
            study.lease.ensure()
            return signalled() or study.lease.stop_order is not None

        search = Search(study, runner, model, plan, observer, stop_requested)
        reason = search.run()
        if search.utilisation.device_s > 0:
            study.note_device_use(search.utilisation.use)
            observer.note(str(search.utilisation.use))
        return reason
