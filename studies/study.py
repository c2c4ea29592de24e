"""Ask and tell: the one write path to a study's storage.

    setup = StudySetup(name=..., problem=..., space=..., study_file=text, directory=path, seed=1, budget_trials=40)
    study = create_study(storage, setup)            # or open_study(storage, setup) to go on with it
    study.reconcile()                               # once, before the first ask: settles what a dead coordinator left
    proposal = study.ask(warm=runner.warm())        # raises SpaceExhausted at the end of the space
    study.ask_batch(8, warm=runner.warm())          # at most 8 of them, chosen jointly
    record = study.tell(proposal, outcome)          # Measurement or Failure; faults of the infrastructure are retried
    study.release(proposal)                         # given back unmeasured (the user stopped); proposed again on resume
    study.ask_repeat(warm=runner.warm())            # at the end: one more run of a member of the front, None for none
    study.trials(), study.front(), study.hypervolume_history(), study.progress(), study.screened_out
    study.close()

One process writes: the one that holds the study's lease (see `studies.lease`), under which it asks for each trial;
workers never open the storage. Every step leaves the storage so that `reconcile` can finish or repeat it exactly once
after a `kill -9`:

- asked, nothing told: the trial is failed as lost and the same candidate waits again, with `retry_of`; one whose
  proposal had not been written yet is failed alone, since nobody has seen it;
- outcome written, state not yet: the trial is finished from the stored outcome, and not measured again;
- failed as lost, not yet waiting again: it is put back.
"""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from search_spaces.engines import engine_spec
from search_spaces.errors import require
from search_spaces.hardware import Device
from search_spaces.metrics import Direction
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, ServingConfig
from search_spaces.space import Space
from studies import pareto
from studies.codec import Json, to_json
from studies.constraints import constraint_names, failed_violations, measured_violations
from studies.device_use import DeviceUse
from studies.errors import LeaseLostError, SpaceExhausted, StudyExistsError, StudyFileChangedError
from studies.generations import Generations
from studies.history import (
    DEVICE_USE,
    EARLIER,
    ENDED,
    NODE_DEVICES,
    POPULATION,
    STABILITY,
    STUDY_FILE,
    STUDY_HASH,
    STUDY_SCHEMA,
    StudyHistory,
    load_optuna_study,
)
from studies.lease import Lease, take_lease
from studies.mirror import Mirror
from studies.noise import Stability, asked_metrics, stability_of
from studies.predictions import PredictionLog
from studies.records import (
    EMULATED,
    EMULATED_NOTE,
    METRICS,
    PROPOSAL,
    SCHEMA,
    STATUS,
    Origin,
    Plan,
    Proposal,
    TrialRecord,
    TrialStatus,
    decode_plan,
)
from studies.repeats import NO_REPEATS, RepeatRule, candidates_of, due_confirmation, due_control
from studies.samplers import (
    SamplerKind,
    ScreenedBreeding,
    population_size,
    require_sampler,
    suggestions,
)
from studies.screen import THOUGHT_AT_ONCE, Choice, Handed, Predict, Request, Screen
from studies.stock import Choosing, Stock
from studies.stopping import Progress, StopReason, progress_of
from studies.storage import Storage
from studies.trial_writer import TrialWriter
from studies.verdict import checked_outcome, pessimistic_values
from studies.worth import Shared

FIXED_PARAMS = "fixed_params"
"""System attribute in which Optuna keeps what a queued trial was given."""
MAX_ATTEMPTS = 3
MAX_LOSSES = 10


@dataclass(frozen=True, kw_only=True)
class StudySetup:
    """What a study is about.

    `study_file` is the text of the resolved study file, stored with the study. `directory` receives `artifacts/` of
    all its studies and `predictions/<name>/`. `budget_trials` and `in_flight` (trials at once) set the population.
    Without `predict` the search is what `sampler` does alone; `shared` says what its predictions have in common, for
    candidates that are chosen jointly. `seeds` are measured right after the defaults; `handed` is what earlier studies
    give to the screen. `repeats` says what is measured again. `devices` are the measured ones of node pools, stored so
    that no other run measures them.
    """

    name: str
    problem: Problem
    space: Space
    study_file: str
    directory: Path
    seed: int
    budget_trials: int
    in_flight: int = 1
    predict: Predict | None = None
    shared: Shared | None = None
    seeds: tuple[Candidate, ...] = field(default=())
    handed: Handed = field(default_factory=Handed)
    sampler: SamplerKind = SamplerKind.NSGA2
    devices: Mapping[str, Device] = field(default_factory=dict)
    repeats: RepeatRule = NO_REPEATS

    def __post_init__(self) -> None:
        require_sampler(self.sampler)
        require(bool(self.name.strip()), "the study has no name; give one")
        require(not set(self.name) & set("/\\\0"), f"study name {self.name!r} names a folder too; leave out / and \\")
        require(self.budget_trials >= 1, f"budget_trials={self.budget_trials} must be at least 1")
        require(self.in_flight >= 1, f"in_flight={self.in_flight} must be at least 1")

    @property
    def artifact_dir(self) -> Path:
        """Folder of the artefacts, as optuna-dashboard takes it with `--artifact-dir`."""
        return self.directory / "artifacts"


def create_study(storage: Storage, setup: StudySetup, lease: Lease | None = None) -> Study:
    """Make the study; raises `StudyExistsError` where the name is taken, `StudyBusyError` where it is being made.

    `lease` is the study's, where the caller has taken it; it passes to the study, which releases it.
    """
    lease = lease or take_lease(storage, setup.name)
    with _released_on_error(lease):
        _make_optuna_study(storage, setup)
        return Study(storage, setup, lease)


def _make_optuna_study(storage: Storage, setup: StudySetup) -> None:
    directions = [StudyDirection[objective.direction.name] for objective in setup.problem.objectives]
    try:
        optuna.create_study(storage=storage.backend, study_name=setup.name, directions=directions)
    except optuna.exceptions.DuplicatedStudyError as error:
        found = load_optuna_study(storage, setup.name)
        if _is_begun(found) or found.directions != directions:
            raise StudyExistsError(
                f"storage {storage.url} has a study {setup.name!r} already; resume it or choose another name"
            ) from error


def _is_begun(study: optuna.Study) -> bool:
    """False where whoever made it died before it was whole."""
    return STUDY_SCHEMA in study.user_attrs or bool(study.get_trials(deepcopy=False))


def open_study(storage: Storage, setup: StudySetup, lease: Lease | None = None) -> Study:
    """Go on with a study; `lease` as for `create_study`.

    Raises `StudyNotFoundError`, `StudyFileChangedError` where it was made with another study file, and
    `StudyBusyError` where another coordinator runs it.
    """
    lease = lease or take_lease(storage, setup.name)
    with _released_on_error(lease):
        return Study(storage, setup, lease)


@contextmanager
def _released_on_error(lease: Lease) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lease.release()
        raise


class Study:
    """A study open for writing; make one with `create_study` or `open_study`."""

    def __init__(self, storage: Storage, setup: StudySetup, lease: Lease) -> None:
        self.setup = setup
        self.lease = lease
        self._initialise(load_optuna_study(storage, setup.name))
        study_id = storage.backend.get_study_id_from_name(setup.name)
        self.history = StudyHistory(storage, setup.name)
        _check_study_file(self.history.study_file, setup)
        self._log = PredictionLog(setup.directory / "predictions" / setup.name)
        self._screen = Screen(
            setup.problem,
            setup.space,
            setup.seed,
            setup.predict,
            self._log,
            setup.shared,
            setup.handed,
        )
        self._breeding = ScreenedBreeding(setup.space, self._screen, self.history.population)
        self._generations = Generations(self.directions, setup.seed, self._breeding, self.history.population)
        setup.artifact_dir.mkdir(parents=True, exist_ok=True)
        self._writer = TrialWriter(
            storage=storage,
            study_id=study_id,
            space=setup.space,
            lease=lease.id,
            artifacts=FileSystemArtifactStore(setup.artifact_dir),
        )
        if setup.devices and setup.devices != self.history.node_devices:
            self._writer.note_study(NODE_DEVICES, to_json(setup.devices))
        self._stock = Stock(setup.in_flight)
        self._used_before = self.history.device_use
        self._mirror = Mirror(storage.direct, study_id, seen=self._generations.add)
        self._enqueue_first()

    def _initialise(self, study: optuna.Study) -> None:
        """Write what belongs to the study itself. The schema goes last: without it nothing here has happened."""
        if _is_begun(study):
            return
        setup = self.setup
        with warnings.catch_warnings():  # the names are what the dashboard shows; the call is marked experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.metric for objective in setup.problem.objectives])
        study.set_user_attr(STUDY_FILE, setup.study_file)
        study.set_user_attr(STUDY_HASH, _sha256(setup.study_file))
        if any(engine_spec(engine).emulated for engine in setup.space.engines):
            _mark_emulated(study)
        study.set_user_attr(POPULATION, population_size(setup.budget_trials, setup.in_flight))
        study.set_user_attr(STUDY_SCHEMA, SCHEMA)

    def _enqueue_first(self) -> None:
        """Queue the default configurations of every engine and mode, then the given seeds, each once."""
        known = self._keys()
        for candidate in self._defaults():
            known = self._enqueue_unless(candidate, Origin.DEFAULT, known)
        for candidate in self.setup.seeds:
            known = self._enqueue_unless(candidate, Origin.SEED, known)

    def _defaults(self) -> list[Candidate]:
        space = self.setup.space
        found = [space.default(mode, engine) for engine in space.engines for mode in space.modes]
        return [candidate for candidate in found if infeasibility(candidate, self.setup.problem) is None]

    def _enqueue_unless(self, candidate: Candidate, origin: Origin, known: set[str]) -> set[str]:
        key = candidate.key
        if key not in known:
            self._enqueue(Plan(candidate=candidate, key=key, origin=origin))
        return known | {key}

    def _enqueue(self, plan: Plan) -> None:
        self._writer.queue(plan)
        self._mirror.read_new()

    def _keys(self) -> set[str]:
        """Keys that must not be proposed: everything that waits, runs, is finished, or was given up."""
        return {trial.key for trial in self.trials() if trial.key is not None}

    # ------------------------------------------------------------------------------------------------ reading

    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials by number, as of the last ask or tell."""
        return tuple(self._mirror.records)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Better direction of each objective."""
        return tuple(objective.direction for objective in self.setup.problem.objectives)

    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front of the feasible measured trials."""
        return pareto.front(self.trials(), self.directions)

    def hypervolume_history(self, last: int | None = None) -> tuple[pareto.HypervolumePoint, ...]:
        """Hypervolume after each finished trial, or the `last` ones, against the reference point of all of them."""
        return pareto.hypervolume_history(self.trials(), self.directions, last=last)

    def progress(self) -> Progress:
        """Counts of trials by state; of those lost in a row, the ones of this run."""
        return progress_of(self.trials(), self.lease.id)

    def stability(self) -> Stability:
        """Noise and drift as far as repeats tell them, of the metrics of the question and the basic latencies."""
        return stability_of(self.trials(), asked_metrics(self.setup.problem))

    def note_earlier(self, studies: Sequence[str]) -> None:
        """Remember with the study which earlier ones it learns from, in words."""
        if list(studies) != list(self.history.earlier):
            self._writer.note_study(EARLIER, list(studies))

    def note_ended(self, reason: StopReason | None) -> None:
        """Remember with the study why this run ended by itself; None as it begins, and where it was stopped."""
        if reason is not self.history.ended:
            self.lease.ensure()
            self._writer.note_study(ENDED, reason)

    def keep_file(self, text: str) -> None:
        """Keep `text` as the study file from now on: the same question with another budget."""
        self.lease.ensure()
        self._writer.note_study(STUDY_FILE, text)
        self._writer.note_study(STUDY_HASH, _sha256(text))

    def note_device_use(self, use: DeviceUse) -> None:
        """Remember with the study how this run has used the devices so far, besides the runs before it."""
        self.lease.ensure()
        self._writer.note_study(DEVICE_USE, to_json(self._used_before.and_then(use)))

    @property
    def screened_out(self) -> int:
        """Candidates that the screen has turned down so far."""
        return self._log.count

    # ------------------------------------------------------------------------------------------------ asking

    def ask(self, warm: Sequence[ServingConfig] = ()) -> Proposal:
        """The next candidate to measure: `ask_batch` of one."""
        return self.ask_batch(1, warm)[0]

    def ask_batch(
        self, most: int, warm: Sequence[ServingConfig] = (), crowded: AbstractSet[str] = frozenset()
    ) -> tuple[Proposal, ...]:
        """The next candidates to measure, at most `most`; `warm` are the configurations whose deployments are up.

        `crowded` names node pools for which enough is waiting: where others have room, those are chosen for.
        What waits goes first: defaults, seeds, repeats; then a control that is due; the rest is chosen jointly, no two
        alike. Raises `SpaceExhausted` when nothing is left to propose.
        """
        self.lease.ensure()
        self._mirror.read_new()
        found = self._start_waiting(most)
        control = due_control(self.trials(), self.setup.repeats) if len(found) < most else None
        if control is not None:
            self._enqueue_repeat(control, Origin.CONTROL)
            found += self._start_waiting(most - len(found))
        if len(found) < most:
            try:
                found += self._propose(self._request(warm, crowded, most - len(found)))
            except SpaceExhausted:
                if not found:
                    raise
        return tuple(found)

    def _start_waiting(self, most: int) -> list[Proposal]:
        found: list[Proposal] = []
        while len(found) < most:
            waiting = next((trial for trial in self._mirror.records if trial.status is TrialStatus.WAITING), None)
            if waiting is None:
                break
            started = self._start(waiting.number)
            if started is not None:
                found.append(started)
        return found

    def _propose(self, request: Request) -> list[Proposal]:
        self._screen.require_untried(request.tried, request.number)
        choices = self._stock.take(request)
        asked = request if self.setup.sampler is SamplerKind.NSGA2 and not choices else None
        generation, bred = self._generations.next(asked)
        plans = [_plan(choice) for choice in choices or bred or self._screen.choose(self._suggested(request), request)]
        begun = [_proposal(self._writer.begin(plan, generation), plan) for plan in plans]
        self._mirror.read_new()
        return begun

    def _request(self, warm: Sequence[ServingConfig], crowded: AbstractSet[str], count: int = 1) -> Request:
        trials = candidates_of(self._mirror.records)
        tried = {trial.key for trial in trials if trial.key is not None}
        number = len(self._mirror.records)
        return Request(number=number, trials=trials, tried=tried, warm=tuple(warm), count=count, crowded=crowded)

    def think_ahead(
        self, warm: Sequence[ServingConfig] = (), crowded: AbstractSet[str] = frozenset()
    ) -> Iterator[None]:
        """Let the model predict what the next `ask` will want to know, a few candidates at each step.

        Nothing is written, and `ask` answers the same without it, only later. Begin anew after each ask and tell. With
        very many trials in flight the next candidates are chosen right away, and what was begun goes on.
        """
        if any(trial.status is TrialStatus.WAITING for trial in self._mirror.records):
            return
        if self._stock.size:
            while self._stock.step(lambda: self._choosing(self._stock.beside(self._request(warm, crowded)))):
                yield
            return
        request = self._request(warm, crowded)
        bred = self._bred(request)
        yield
        yield from self._screen.think(bred, request)

    def _choosing(self, request: Request) -> Choosing:
        return self._screen.choosing(self._suggested(request) or self._bred(request), request, THOUGHT_AT_ONCE)

    def _bred(self, request: Request) -> list[Candidate]:
        """Children as NSGA-II would breed them now; none of another sampler."""
        return self._breeding.children(request) if self.setup.sampler is SamplerKind.NSGA2 else []

    def ask_repeat(self, warm: Sequence[ServingConfig] = ()) -> Proposal | None:
        """The next run of what was measured before: a control that is due, then members of the front that lack runs.

        None when none is to be begun now. What runs may still change the front: ask again when it is told.
        """
        self.lease.ensure()
        self._mirror.read_new()
        waits = (t.number for t in self._mirror.records if t.is_repeat and t.status is TrialStatus.WAITING)
        number = next(waits, None)
        if number is not None:
            return self._start(number) or self.ask_repeat(warm)
        trials, rule = self.trials(), self.setup.repeats
        control = due_control(trials, rule)
        member = due_confirmation(trials, self.front(), rule, warm) if control is None else None
        if control is not None:
            self._enqueue_repeat(control, Origin.CONTROL)
        elif member is not None:
            self._enqueue_repeat(member, Origin.CONFIRM)
        else:
            return None
        return self.ask_repeat(warm)

    def repeat(self, number: int, runs: int) -> None:
        """Let the candidate of measured trial `number` have at least `runs` runs: queues what is missing of them.

        Asked again, it queues nothing more; `ask_repeat` begins what is queued.
        """
        self.lease.ensure()
        self._mirror.read_new()
        of = self._mirror.records[number]
        require(of.status is TrialStatus.MEASURED, f"trial {number} is {of.status}; only what was measured is repeated")
        asked = sum(trial.key == of.key and trial.retry_of is None for trial in self._mirror.records)
        for _ in range(runs - asked):
            self._enqueue_repeat(of, Origin.CONTROL)

    def _enqueue_repeat(self, of: TrialRecord, origin: Origin) -> None:
        if of.candidate is None or of.key is None:
            raise AssertionError(f"trial {of.number} was measured and has a candidate")
        self._enqueue(Plan(candidate=of.candidate, key=of.key, origin=origin, repeat_of=of.number))

    def _suggested(self, request: Request) -> list[Candidate]:
        """What the sampler suggests; nothing for NSGA-II, whose children are bred from the second generation on."""
        if self.setup.sampler is SamplerKind.NSGA2:
            return []
        seed = self._screen.numpy_seed(request.number)
        return suggestions(self.setup.sampler, self._generations.study, self.setup.space, seed)

    def _start(self, number: int) -> Proposal | None:
        """Begin a trial that waits; None where it does not any more, or was measured before."""
        trial = self._mirror.refresh(number)
        if self._mirror.records[number].status is not TrialStatus.WAITING:
            return None
        stored = trial.user_attrs.get(PROPOSAL)
        plan = decode_plan(stored) if stored is not None else self._foreign_plan(trial)
        if stored is None and plan.key in {other.key for other in self._mirror.records}:
            self._writer.refuse(self._mirror.trial_id(number))
            self._mirror.refresh(number)
            return None
        plan = replace(plan, prediction=self._screen.predict_one(plan.candidate))  # with what the model knows now
        generation = None if plan.repeat_of is not None else self._generations.next()[0]
        self._writer.start(self._mirror.trial_id(number), trial.params, plan, generation)
        self._mirror.refresh(number)
        return _proposal(number, plan)

    def _foreign_plan(self, trial: FrozenTrial) -> Plan:
        """The plan of a trial that another program queued: a seed; what it leaves open is as in the default."""
        space = self.setup.space
        genotype = {**space.encode(space.default()), **trial.params, **trial.system_attrs.get(FIXED_PARAMS, {})}
        candidate = space.decode(genotype)
        return Plan(candidate=candidate, key=candidate.key, origin=Origin.SEED)

    # ------------------------------------------------------------------------------------------------ telling

    def tell(self, proposal: Proposal, outcome: Outcome) -> TrialRecord:
        """Record what became of `proposal`, artefacts included, and return the trial as stored.

        A failure of the infrastructure makes the trial lost and queues its candidate again, up to `MAX_ATTEMPTS` tries.
        """
        self.lease.ensure()
        checked = checked_outcome(outcome, self.setup.problem)
        self._require_running(proposal)
        self._writer.note_outcome(self._mirror.trial_id(proposal.trial_number), checked)
        self._finish(proposal.trial_number, checked)
        return self._mirror.records[proposal.trial_number]

    def release(self, proposal: Proposal) -> TrialRecord:
        """Give `proposal` back unmeasured: its trial is lost, and its candidate waits without a try being counted."""
        self.lease.ensure()
        self._require_running(proposal)
        failure = Failure(reason=FailureReason.LOST_COORDINATOR, detail="the study was stopped before the measurement")
        lost = self._lose(proposal.trial_number, failure)
        self._requeue(lost, counted=False)
        return lost

    def _require_running(self, proposal: Proposal) -> None:
        self._mirror.refresh(proposal.trial_number)
        status = self._mirror.records[proposal.trial_number].status
        require(
            status is TrialStatus.RUNNING,
            f"trial {proposal.trial_number} is {status}, not running: it was told or released before; ask for another",
        )

    def _finish(self, number: int, outcome: Outcome) -> None:
        """Bring a running trial whose outcome is stored to its end. Repeating it after a crash does no harm."""
        if isinstance(outcome, Measurement):
            metrics = outcome.metrics.flat()
            violations = measured_violations(self.setup.problem.slos, metrics)
            values = [metrics[objective.metric] for objective in self.setup.problem.objectives]
            attrs: dict[str, Json] = {METRICS: to_json(metrics), STATUS: TrialStatus.MEASURED.value}
        elif outcome.retryable:
            self._requeue(self._lose(number, None), counted=True)
            return
        else:
            trials = self.trials()
            values = list(pessimistic_values(trials, trials[number].prediction, self.setup.problem))
            violations = failed_violations([trial.violations for trial in trials if trial.is_finished])
            attrs = {STATUS: TrialStatus.FAILED.value}
        names = constraint_names(self.setup.problem.slos)
        self._writer.complete(self._mirror.trial_id(number), attrs, names, violations, values)
        self._mirror.refresh(number)
        if self._mirror.records[number].is_repeat:
            self._writer.note_study(STABILITY, to_json(self.stability()))

    def _lose(self, number: int, failure: Failure | None) -> TrialRecord:
        self._writer.lose(self._mirror.trial_id(number), failure)
        self._mirror.refresh(number)
        return self._mirror.records[number]

    def _requeue(self, lost: TrialRecord, *, counted: bool) -> None:
        """Queue the candidate of a lost trial again unless that has happened or its tries are used up."""
        if lost.candidate is None or lost.key is None or lost.origin is None:
            return
        if any(trial.retry_of == lost.number for trial in self.trials()):
            return
        by_coordinator = lost.failure is None or lost.failure.reason is FailureReason.LOST_COORDINATOR
        attempt = lost.attempt + int(counted and not by_coordinator)
        losses = lost.losses + int(counted and by_coordinator)
        if attempt > MAX_ATTEMPTS or losses > MAX_LOSSES:
            return
        self._enqueue(
            Plan(
                candidate=lost.candidate,
                key=lost.key,
                origin=lost.origin,
                attempt=attempt,
                losses=losses,
                retry_of=lost.number,
                repeat_of=lost.repeat_of,
            )
        )

    # ------------------------------------------------------------------------------------------------ after a crash

    def reconcile(self) -> tuple[TrialRecord, ...]:
        """Settle what a dead coordinator left, exactly once, and return the trials that were touched.

        A running trial that was asked for under another lease than this study's is one that nobody measures any more.
        """
        self.lease.ensure()
        touched = []
        for trial in self.trials():
            if trial.status is TrialStatus.RUNNING and trial.lease != self.lease.id:
                self._settle(trial)
                touched.append(trial.number)
        for trial in self.trials():
            if trial.status is TrialStatus.LOST:
                self._requeue(trial, counted=True)
        after = self.trials()
        return tuple(after[number] for number in touched)

    def _settle(self, trial: TrialRecord) -> None:
        """End a trial that its coordinator left running: from its stored outcome, else as lost."""
        if trial.outcome is not None:
            self._finish(trial.number, trial.outcome)
        else:
            detail = "the coordinator ended while the candidate was being measured"
            self._lose(trial.number, Failure(reason=FailureReason.LOST_COORDINATOR, detail=detail))

    def close(self) -> None:
        """Write what is buffered, unless the lease is lost, and let others write to the study."""
        with suppress(LeaseLostError):
            self.flush()
        self.lease.release()

    def flush(self) -> None:
        """Write what is buffered; raises `LeaseLostError`."""
        self.lease.ensure()
        self._log.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plan(choice: Choice) -> Plan:
    return Plan(
        candidate=choice.candidate,
        key=choice.key,
        origin=choice.origin,
        prediction=choice.prediction,
        expected_gain=choice.expected_gain,
    )


def _proposal(number: int, plan: Plan) -> Proposal:
    return Proposal(
        trial_number=number,
        candidate=plan.candidate,
        origin=plan.origin,
        prediction=plan.prediction,
        attempt=plan.attempt,
        repeat_of=plan.repeat_of,
    )


def _check_study_file(stored: str, setup: StudySetup) -> None:
    if stored == setup.study_file:
        return
    lines = difflib.unified_diff(
        stored.splitlines(), setup.study_file.splitlines(), "stored with the study", "given now", lineterm="", n=1
    )
    raise StudyFileChangedError(
        f"study {setup.name!r} was made with another study file; resume it with its own, or choose another name:\n"
        + "\n".join(lines)
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _mark_emulated(study: optuna.Study) -> None:
    """Say on the study itself, and in the dashboard's note, that its figures are no measurements."""
    from optuna_dashboard import save_note

    study.set_user_attr(EMULATED, EMULATED_NOTE)
    save_note(study, f"**{EMULATED_NOTE}**")
